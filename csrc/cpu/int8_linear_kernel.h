// Rows to 8-bit integers, and products of 8-bit integers. Included by for_each_isa.h. A word holds 4 numbers that are
// neighbours along the contracted axis: of the left operand u8, of the right one s8.
#include "gemm.h"
#include "layer_norm_row.h"
#include "vec_math.h"
// after those
#include "parameter.h"
// after that
#include "int8_finish.h"

constexpr int kPanelVecs = VITFAST_LEVEL >= 2 ? 4 : 2;  // of a register tile; divides a whole panel's

typedef uint8_t BVec __attribute__((vector_size(kLanes)));

// The largest magnitude of a row; NaN or infinity if the row has one. As integers, magnitudes compare as the numbers do
// and NaN is above all.
template <class T>
VITFAST_INLINE float largest_magnitude(const T* x, int64_t width) {
    IVec largest[4] = {};
    const auto take = [&](int u, Vec value) __attribute__((always_inline)) {
        const IVec magnitude = (IVec)value & 0x7fffffff;
        largest[u] = magnitude > largest[u] ? magnitude : largest[u];
    };
    int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) take(u, load(x + i + u * kLanes));
    }
    for (; i < width; i += kLanes) take(0, load(x + i, width - i));
    int32_t bits = 0;
    for (int u = 0; u < 4; ++u) {
        for (int lane = 0; lane < kLanes; ++lane) bits = std::max(bits, largest[u][lane]);
    }
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
}

// q[width rounded up to 4] = round(x / scale) + 128, scale = largest magnitude / 127: NaN where that is not finite.
// Past the row's end q is 0, where the right operand is too.
template <class T>
void quantize_row(const T* x, int64_t width, uint8_t* q, float* scale) {
    const float magnitude = largest_magnitude(x, width);
    const bool finite = magnitude <= std::numeric_limits<float>::max();
    const float bounded = std::max(finite ? magnitude : 1.0f, kLeastMagnitude), factor = 127.0f / bounded;
    *scale = finite ? bounded / 127.0f : std::numeric_limits<float>::quiet_NaN();
    // Adding 1.5 * 2^23 + 128 rounds to the nearest integer, ties to even, and leaves it plus 128 in the lowest byte.
    const auto bytes = [&](Vec value) __attribute__((always_inline)) {
        return __builtin_convertvector((UVec)(value * factor + 12583040.0f) & 0xffu, BVec);
    };
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const BVec block = bytes(load(x + i));
        __builtin_memcpy(q + i, &block, kLanes);
    }
    if (i < width) {
        const BVec block = bytes(load(x + i, width - i));
        __builtin_memcpy(q + i, &block, width - i);
    }
    for (i = width; i % 4 != 0; ++i) q[i] = 0;
}

// Rows [begin, end), normalised first where a.norm_weight is given; row: width (rounded up) numbers of scratch.
template <class X>
void quantize_rows(const QuantizeRows<X>& a, int64_t begin, int64_t end, float* row) {
    for (int64_t t = begin; t < end; ++t) {
        const X* const x = a.x + t * a.width;
        uint8_t* const q = a.q + t * a.pitch;
        if (a.norm_weight) {
            float mean, rstd;
            row_statistics(x, a.width, a.eps, &mean, &rstd);
            normalise_row(x, mean, rstd, a.norm_weight, a.norm_bias, row, a.width);
            quantize_row(row, a.width, q, a.scale + t);
        } else {
            quantize_row(x, a.width, q, a.scale + t);
        }
    }
}

// sum + the 4 products of each lane's word, without saturation. Left and Right are the operands as the product needs
// them, made once for each word that is read.
#if VITFAST_VNNI
typedef IVec Left;
typedef IVec Right;
VITFAST_INLINE Left left_word(IVec word) { return word; }
VITFAST_INLINE Right right_words(IVec words) { return words; }
VITFAST_INLINE IVec dot(Left a, Right b, IVec sum) {
    return (IVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#else
// vpmaddubsw would saturate at 16 bits. So the even and the odd bytes are widened, for products of 16-bit pairs.
typedef int16_t SVec __attribute__((vector_size(kLanes * 4)));
struct Pairs {
    SVec even, odd;
};
typedef Pairs Left;
typedef Pairs Right;
VITFAST_INLINE Left left_word(IVec word) { return {(SVec)(word & 0x00ff00ff), (SVec)((UVec)word >> 8 & 0x00ff00ffu)}; }
VITFAST_INLINE Right right_words(IVec words) { return {(SVec)words << 8 >> 8, (SVec)words >> 8}; }
VITFAST_INLINE IVec madd(SVec a, SVec b) {
#if VITFAST_LEVEL >= 2
    return (IVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif VITFAST_LEVEL == 1
    return (IVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const IVec low = ((IVec)a << 16 >> 16) * ((IVec)b << 16 >> 16);
    return low + ((IVec)a >> 16) * ((IVec)b >> 16);
#endif
}
VITFAST_INLINE IVec dot(Left a, Right b, IVec sum) { return sum + madd(a.even, b.even) + madd(a.odd, b.odd); }
#endif

// sums[M, kPanelColumns] = left[M rows, words] * panel[words, columns], accumulators in registers.
template <int M, int N>
void int8_tile(const uint8_t* left, int64_t pitch, const uint32_t* panel, int64_t columns, int64_t words, int32_t* sums,
               Ahead* ahead) {
    IVec sum[M][N] = {};
    for (int64_t first = 0; first < words; first += kAheadWords) {
        ahead->fetch();
        const int64_t last = std::min(words, first + kAheadWords);
        for (int64_t k = first; k < last; ++k) {
            Right b[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) b[n] = right_words(load_int(panel + k * columns + n * kLanes));
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const Left a = left_word((IVec)broadcast_word(reinterpret_cast<const uint32_t*>(left + m * pitch) + k));
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) sum[m][n] = dot(a, b[n], sum[m][n]);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            __builtin_memcpy(sums + m * kPanelColumns + n * kLanes, &sum[m][n], sizeof(IVec));
        }
    }
}

template <int N>
VITFAST_INLINE void int8_tile_rows(int rows, const uint8_t* left, int64_t pitch, const uint32_t* panel, int64_t columns,
                                   int64_t words, int32_t* sums, Ahead* ahead) {
    switch (rows) {
        case 1:
            return int8_tile<1, N>(left, pitch, panel, columns, words, sums, ahead);
        case 2:
            return int8_tile<2, N>(left, pitch, panel, columns, words, sums, ahead);
        case 3:
            return int8_tile<3, N>(left, pitch, panel, columns, words, sums, ahead);
        case 4:
            return int8_tile<4, N>(left, pitch, panel, columns, words, sums, ahead);
#if VITFAST_LEVEL >= 2
        case 5:
            return int8_tile<5, N>(left, pitch, panel, columns, words, sums, ahead);
        case 6:
            return int8_tile<6, N>(left, pitch, panel, columns, words, sums, ahead);
#endif
    }
}

VITFAST_INLINE void int8_tile_any(int64_t vectors, int rows, const uint8_t* left, int64_t pitch, const uint32_t* panel,
                                  int64_t columns, int64_t words, int32_t* sums, Ahead* ahead) {
    switch (vectors) {
#if VITFAST_LEVEL >= 2
        case 1:
            return int8_tile_rows<1>(rows, left, pitch, panel, columns, words, sums, ahead);
        case 2:
            return int8_tile_rows<2>(rows, left, pitch, panel, columns, words, sums, ahead);
        case 3:
            return int8_tile_rows<3>(rows, left, pitch, panel, columns, words, sums, ahead);
#endif
        default:
            return int8_tile_rows<kPanelVecs>(rows, left, pitch, panel, columns, words, sums, ahead);
    }
}

// Output rows [begin, end), at most kBlockRows, of the panels [first, last); sums: kBlockRows * kPanelColumns numbers
// of scratch.
template <class Y>
void multiply_int8(const Int8Product<Y>& a, int64_t begin, int64_t end, int64_t first, int64_t last, int32_t* sums) {
    const int64_t words = a.pitch / 4, rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t index = first; index < last; ++index) {
        const int64_t columns = panel_columns(a.outputs, index), at = index * kPanelColumns;
        const int64_t count = std::min(kPanelColumns, a.outputs - at);
        const uint32_t* const panel = a.packed + at * words;
        // The next panel comes into L2 while this one is in use.
        const int64_t next = index + 1 < last ? panel_columns(a.outputs, index + 1) * words * 4 : 0;
        const int64_t times = std::max<int64_t>(1, tiles * ((words + kAheadWords - 1) / kAheadWords));
        Ahead ahead{reinterpret_cast<const char*>(panel + columns * words), next > 0, next, 0, next / 64 / times + 1};
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t m = begin + rows * tile / tiles, height = begin + rows * (tile + 1) / tiles - m;
            for (int64_t i = 0; i < height; ++i) {
                const int64_t start = (m + i) * a.outputs + at;
                prefetch_row_to_write(a.out + start, count);
                if (a.residual) prefetch_row(a.residual + start, count);
            }
            for (int64_t j = 0; j < columns; j += kPanelVecs * kLanes) {
                const int64_t vectors = std::min<int64_t>(kPanelVecs, (columns - j) / kLanes);
                int8_tile_any(vectors, height, a.q + m * a.pitch, a.pitch, panel + j, columns, words, sums + j, &ahead);
            }
            finish_rows(a, sums, kPanelColumns, m, height, at, count);
        }
    }
}
