// One vector of fp32 lanes, the same small interface for each instruction set. Included by for_each_isa.h inside the
// instruction set's namespace, so it has no include guard and includes nothing.
// Built on the compiler's vector types: + - * / and comparisons are operators; intrinsics only where those fall short.

#ifndef VITFAST_INLINE
#define VITFAST_INLINE_MEMBER inline __attribute__((always_inline))
#define VITFAST_INLINE static VITFAST_INLINE_MEMBER
#endif

constexpr int kLanes = VITFAST_LEVEL >= 2 ? 16 : VITFAST_LEVEL == 1 ? 8 : 4;

constexpr int64_t round_to_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));  // kLanes bf16 bit patterns

VITFAST_INLINE Vec broadcast(float value) { return value - Vec{}; }

VITFAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if VITFAST_LEVEL >= 2
    return _mm512_fmadd_ps(a, b, c);
#elif VITFAST_LEVEL == 1
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// The larger of a and b; b where either is NaN.
VITFAST_INLINE Vec max(Vec a, Vec b) {
#if VITFAST_LEVEL >= 2
    return _mm512_max_ps(a, b);
#elif VITFAST_LEVEL == 1
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// The smaller of a and b; b where either is NaN.
VITFAST_INLINE Vec min(Vec a, Vec b) {
#if VITFAST_LEVEL >= 2
    return _mm512_min_ps(a, b);
#elif VITFAST_LEVEL == 1
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

VITFAST_INLINE float reduce_add(Vec a) {
#if VITFAST_LEVEL >= 2
    return _mm512_reduce_add_ps(a);
#else
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += a[i];
    return sum;
#endif
}

// The largest lane; lanes that are NaN may be passed over.
VITFAST_INLINE float reduce_max(Vec a) {
#if VITFAST_LEVEL >= 2
    return _mm512_reduce_max_ps(a);
#else
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
    }
    return a[0];
#endif
}

// bf16 is the upper half of fp32; rounds to nearest even, NaN stays NaN. The native instruction flushes subnormals to
// 0.
VITFAST_INLINE HVec to_bf16_bits(Vec a) {
#if VITFAST_LEVEL >= 3
    return (HVec)_mm512_cvtneps_pbh(a);
#else
    const UVec bits = (UVec)a;
    const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UVec quiet_nan = (bits >> 16) | 0x40u;
    return __builtin_convertvector(a == a ? rounded : quiet_nan, HVec);
#endif
}

// 16-bit lanes to 32-bit lanes; GCC 12 would split the conversion in two.
VITFAST_INLINE UVec widen(HVec bits) {
#if VITFAST_LEVEL >= 2
    return (UVec)_mm512_cvtepu16_epi32((__m256i)bits);
#elif VITFAST_LEVEL == 1
    return (UVec)_mm256_cvtepu16_epi32((__m128i)bits);
#else
    return __builtin_convertvector(bits, UVec);
#endif
}

VITFAST_INLINE Vec from_bf16_bits(HVec bits) { return (Vec)(widen(bits) << 16); }

VITFAST_INLINE Vec load(const float* from) {
    Vec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
}

VITFAST_INLINE Vec load(const bf16* from) {
    HVec bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return from_bf16_bits(bits);
}

VITFAST_INLINE void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(value)); }

VITFAST_INLINE void store(bf16* to, Vec value) {
    const HVec bits = to_bf16_bits(value);
    __builtin_memcpy(to, &bits, sizeof(bits));
}

// The first n of kLanes elements; lanes past n are 0. n may be larger than kLanes.
template <class T>
VITFAST_INLINE Vec load(const T* from, int64_t n) {
    if (__builtin_expect(n >= kLanes, 1)) return load(from);
    T buffer[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = from[i];
    return load(buffer);
}

template <class T>
VITFAST_INLINE void store(T* to, Vec value, int64_t n) {
    if (__builtin_expect(n >= kLanes, 1)) return store(to, value);
    T buffer[kLanes];
    store(buffer, value);
    for (int64_t i = 0; i < n; ++i) to[i] = buffer[i];
}
