// Multiply-adds on registers alone, as fast as the instruction set allows. Included by for_each_isa.h. Every function
// runs kRepeats rounds of independent chains over `data`, kPeakBytes of small numbers: read once before, the sums
// written after, so that neither the compiler nor memory has a part in it. Returns the operations; a multiply-add is
// two.

constexpr int kChains = 12;  // at least 2 units x 4 cycles of latency, and with two operands within AVX2's 16 registers
constexpr int64_t kRepeats = 4096;

// Chain is one register of sums; add(sum, a, b) is what is counted, `each` its operations. (Lambdas capture by [&]:
// without it they would convert to functions that pass registers this file's callers may not have.)
template <class Chain, class Add>
VITFAST_INLINE int64_t run_chains(void* data, int64_t each, const Add& add) {
    static_assert((kChains + 2) * sizeof(Chain) <= kPeakBytes);
    Chain chain[kChains], a, b;
    char* const bytes = static_cast<char*>(data);
    __builtin_memcpy(&a, bytes + kChains * sizeof(Chain), sizeof(Chain));
    __builtin_memcpy(&b, bytes + (kChains + 1) * sizeof(Chain), sizeof(Chain));
    __builtin_memcpy(chain, bytes, sizeof(chain));
    for (int64_t i = 0; i < kRepeats; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) chain[c] = add(chain[c], a, b);
    }
    __builtin_memcpy(bytes, chain, sizeof(chain));
    return kRepeats * kChains * each;
}

VITFAST_INLINE int64_t multiply_add_fp32(void* data) {
    return run_chains<Vec>(data, 2 * kLanes,
                           [&](Vec sum, Vec a, Vec b) __attribute__((always_inline)) { return fma(a, b, sum); });
}

#if VITFAST_AMX
// Four tiles of 16 x 16 sums, so that each waits for its own last product only; two tiles on either side, 64 bytes a
// row.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A macro: the tiles' numbers are part of the instructions.
#define VITFAST_FOUR_PRODUCTS(product) \
    product(0, 4, 6);                  \
    product(1, 4, 7);                  \
    product(2, 5, 6);                  \
    product(3, 5, 7)

template <bool kBytes>
VITFAST_INLINE int64_t multiply_add_tiles(void* data) {
    static_assert(16 * 64 <= kPeakBytes);
    const TileConfig config;
    asm volatile("" : : "r"(&config), "r"(data) : "memory");  // the intrinsics do not say that they read memory
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, data, 64);
    _tile_loadd(5, data, 64);
    _tile_loadd(6, data, 64);
    _tile_loadd(7, data, 64);
    for (int64_t i = 0; i < kRepeats; ++i) {
        if constexpr (kBytes) {
            VITFAST_FOUR_PRODUCTS(_tile_dpbusd);
        } else {
            VITFAST_FOUR_PRODUCTS(_tile_dpbf16ps);
        }
    }
    _tile_release();
    return kRepeats * 4 * 2 * 16 * 16 * (kBytes ? 64 : 32);
}
#undef VITFAST_FOUR_PRODUCTS
#endif

// Below AVX512-BF16 a product of bf16 numbers is one of fp32 numbers.
VITFAST_INLINE int64_t multiply_add_bf16(void* data) {
#if VITFAST_AMX
    return multiply_add_tiles<false>(data);
#elif VITFAST_LEVEL >= 3
    return run_chains<Vec>(data, 4 * kLanes, [&](Vec sum, Vec a, Vec b) __attribute__((always_inline)) {
        return (Vec)_mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    });
#else
    return multiply_add_fp32(data);
#endif
}

// Below VNNI as int8_linear multiplies there: pairs of 16 bits; on the portable path 32 bits.
VITFAST_INLINE int64_t multiply_add_int8(void* data) {
#if VITFAST_AMX
    return multiply_add_tiles<true>(data);
#elif VITFAST_VNNI
    return run_chains<IVec>(data, 8 * kLanes, [&](IVec sum, IVec a, IVec b) __attribute__((always_inline)) {
        return (IVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
    });
#elif VITFAST_LEVEL >= 2
    return run_chains<IVec>(data, 4 * kLanes, [&](IVec sum, IVec a, IVec) __attribute__((always_inline)) {
        return sum + (IVec)_mm512_madd_epi16((__m512i)sum, (__m512i)a);  // of the sum: else it is made once for all
    });
#elif VITFAST_LEVEL == 1
    return run_chains<IVec>(data, 4 * kLanes, [&](IVec sum, IVec a, IVec) __attribute__((always_inline)) {
        return sum + (IVec)_mm256_madd_epi16((__m256i)sum, (__m256i)a);
    });
#else
    return run_chains<UVec>(data, 2 * kLanes,
                            [&](UVec sum, UVec a, UVec b) __attribute__((always_inline)) { return sum * a + b; });
#endif
}

void multiply_add(PeakDtype dtype, void* data, int64_t* operations) {
    switch (dtype) {
        case PeakDtype::kFloat32:
            *operations += multiply_add_fp32(data);
            break;
        case PeakDtype::kBFloat16:
            *operations += multiply_add_bf16(data);
            break;
        case PeakDtype::kInt8:
            *operations += multiply_add_int8(data);
            break;
    }
}
