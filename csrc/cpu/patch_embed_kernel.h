// Pixels to patches and back, and the assembly of tokens. Included by for_each_isa.h.
#include "parameter.h"

VITFAST_INLINE Vec load(const uint8_t* from) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    Bytes bytes;
    __builtin_memcpy(&bytes, from, sizeof(bytes));
    return __builtin_convertvector(__builtin_convertvector(bytes, IVec), Vec);
}

// fp16 to fp32 in integer steps: the exponent is moved by a product, inf and NaN keep theirs at the top.
VITFAST_INLINE Vec load(const fp16* from) {
    HVec halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    const UVec bits = widen(halves);
    const UVec magnitude = (bits & 0x7fffu) << 13;
    const UVec finite = (UVec)((Vec)magnitude * 0x1p112f);
    const UVec special = magnitude | 0x7f800000u;
    return (Vec)(((bits & 0x7c00u) == 0x7c00u ? special : finite) | ((bits & 0x8000u) << 16));
}

// n (at most kLanes) pixels `stride` elements apart.
template <class X>
VITFAST_INLINE Vec load_pixels(const X* from, int64_t stride, int64_t n) {
    if (stride == 1 && n >= kLanes) return load(from);
    X buffer[kLanes] = {};
    for (int64_t i = 0; i < std::min<int64_t>(n, kLanes); ++i) buffer[i] = from[i * stride];
    return load(buffer);
}

// Rows of patches [begin, end), counted over all images: image = row / grid_h.
template <class X, class Y>
void patchify_rows(const Patchify<X, Y>& a, int64_t begin, int64_t end) {
    const int64_t area = a.patch * a.patch, length = a.channels * area;
    for (int64_t row = begin; row < end; ++row) {
        const X* const image = a.images + row / a.grid_h * a.stride[0];
        Y* const patches = a.patches + row * a.grid_w * length;
        for (int64_t c = 0; c < a.channels; ++c) {
            const Vec scale = broadcast(a.scale[c]), shift = broadcast(a.shift[c]);
            for (int64_t p = 0; p < a.patch; ++p) {
                const X* const line = image + c * a.stride[1] + (row % a.grid_h * a.patch + p) * a.stride[2];
                for (int64_t x = 0; x < a.grid_w; ++x) {
                    Y* const out = patches + x * length + c * area + p * a.patch;
                    for (int64_t q = 0; q < a.patch; q += kLanes) {
                        const X* const from = line + (x * a.patch + q) * a.stride[3];
                        const Vec pixels = load_pixels(from, a.stride[3], a.patch - q);
                        store(out + q, fma(pixels, scale, shift), a.patch - q);
                    }
                }
            }
        }
    }
}

// d_images [B, C, grid_h * P, grid_w * P], contiguous; rows as above.
template <class Y, class X>
void unpatchify_rows(const Unpatchify<Y, X>& a, int64_t begin, int64_t end) {
    const int64_t area = a.patch * a.patch, length = a.channels * area, line_length = a.grid_w * a.patch;
    for (int64_t row = begin; row < end; ++row) {
        const Y* const patches = a.d_patches + row * a.grid_w * length;
        for (int64_t c = 0; c < a.channels; ++c) {
            for (int64_t p = 0; p < a.patch; ++p) {
                const int64_t plane = row / a.grid_h * a.channels + c;
                const int64_t y = plane * a.grid_h * a.patch + row % a.grid_h * a.patch + p;
                X* const line = a.d_images + y * line_length;
                for (int64_t x = 0; x < a.grid_w; ++x) {
                    const Y* const from = patches + x * length + c * area + p * a.patch;
                    for (int64_t q = 0; q < a.patch; q += kLanes) {
                        store(line + x * a.patch + q, load(from + q, a.patch - q) * a.scale[c], a.patch - q);
                    }
                }
            }
        }
    }
}

// Tokens [begin, end), counted over all images.
template <class Y, class X>
void assemble_rows(const AssembleTokens<Y, X>& a, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        const int64_t image = token / a.tokens_per_image, at = token % a.tokens_per_image;
        const bool is_prefix = at < a.prefixes;
        const int64_t patch = at - a.prefixes, position = a.pos_has_prefix ? at : patch;
        const int64_t patches = a.tokens_per_image - a.prefixes;
        const bool placed = a.pos_embed && position >= 0;
        for (int64_t d = 0; d < a.width; d += kLanes) {
            const int64_t n = a.width - d;
            Vec value;
            if (is_prefix) {
                value = load(a.prefix, at * a.width + d, n);
            } else {
                value = load(a.projected + (image * patches + patch) * a.width + d, n);
                if (a.bias) value += load(a.bias, d, n);
            }
            if (placed) value += load(a.pos_embed, position * a.width + d, n);
            store(a.tokens + token * a.width + d, value, n);
        }
    }
}
