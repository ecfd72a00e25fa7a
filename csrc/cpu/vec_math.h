// exp2, the normal distribution function and GELU on vectors. Included by *_kernel.h after vec.h, inside the
// instruction set's namespace. The coefficients are minimax fits made for this file (Lawson's iteration).

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^y for y <= 127; relative error below 1.5e-7 (2 ulp), kFast: 8e-5, a fiftieth of half a bf16 ulp. Exactly 0 below
// -126, where making a subnormal number takes the CPU over a hundred cycles; NaN stays NaN.
template <bool kFast = false>
VITFAST_INLINE Vec exp2(Vec y) {
    // 2^y = 2^whole * 2^f with f in [0, 1): vreduceps gives f, and 0 for -inf; vscalefps takes the floor by itself.
#if VITFAST_LEVEL >= 2
    const Vec f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const Vec bounded = max(broadcast(-150.0f), y);
    const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Vec shifted = bounded - 0.5f + magic;
    const Vec f = bounded - (shifted - magic);
#endif
    Vec p;
    if constexpr (kFast) {
        p = fma(broadcast(0.07802300900220871f), f, broadcast(0.2260693907737732f));
        p = fma(p, f, broadcast(0.6958328485488892f));
        p = fma(p, f, broadcast(0.9999252557754517f));
    } else {
        p = fma(broadcast(0.0018775744829326868f), f, broadcast(0.008989345282316208f));
        p = fma(p, f, broadcast(0.05582631379365921f));
        p = fma(p, f, broadcast(0.24015362560749054f));
        p = fma(p, f, broadcast(0.6931530833244324f));
        p = fma(p, f, broadcast(0.9999999403953552f));
    }
#if VITFAST_LEVEL >= 2
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, broadcast(-126.0f), _CMP_NLT_UQ), p, y);
#else
    const Vec power = (Vec)(((IVec)shifted << 23) + 0x3f800000);
    return y < -126.0f ? Vec{} : p * power;
#endif
}

// 1 / (1 + 2^y), the logistic function of -y / log2(e), for bf16 results: relative error below 1.5e-4.
VITFAST_INLINE Vec fast_logistic(Vec y) {
#if VITFAST_LEVEL >= 2
    return _mm512_rcp14_ps(exp2<true>(y) + 1.0f);  // 2^y may be infinite
#else
    return y > 127.0f ? Vec{} : 1.0f / (exp2<true>(y) + 1.0f);
#endif
}

// Phi(x), the standard normal distribution function. Absolute error 1e-7, as exp2 of a polynomial: log(2 Phi(-a)) +
// a^2/2 is smooth. kFast: 1e-4, with a relative error below 4e-4, a fifth of half a bf16 ulp, for all x > -3, as the
// logistic function of an odd polynomial: there is nothing to choose by x's sign.
template <bool kFast>
VITFAST_INLINE Vec normal_cdf(Vec x) {
    if constexpr (kFast) {
        const Vec t = x * x;
        Vec p = fma(broadcast(-1.3429012142296415e-06f), t, broadcast(3.794001531787217e-05f));
        p = fma(p, t, broadcast(0.0007877607131376863f));
        p = fma(p, t, broadcast(-0.10652823746204376f));
        p = fma(p, t, broadcast(-2.3009769916534424f));
        return fast_logistic(p * x);
    }
    const Vec a = x < 0.0f ? -x : x;
    const Vec t = min(broadcast(6.0f), a);
    Vec p = fma(broadcast(1.514100631538895e-07f), t, broadcast(-3.583273155527422e-06f));
    p = fma(p, t, broadcast(3.3750711736502126e-05f));
    p = fma(p, t, broadcast(-0.00014071501209400594f));
    p = fma(p, t, broadcast(-8.670175157021731e-05f));
    p = fma(p, t, broadcast(0.004897577688097954f));
    p = fma(p, t, broadcast(-0.03639241307973862f));
    p = fma(p, t, broadcast(0.18170306086540222f));
    p = fma(p, t, broadcast(-0.797885537147522f));
    p = fma(p, t, broadcast(-kLn2));
    const Vec lower = exp2(fma(a * -0.5f, a, p) * kLog2E);  // Phi(-a)
    return x < 0.0f ? lower : 1.0f - lower;
}

// GELU (Hendrycks and Gimpel, 2016): x * Phi(x), and its derivative Phi(x) + x * phi(x). kFast, here and below: for
// bf16 results.
template <bool kFast>
struct Gelu {
    static VITFAST_INLINE_MEMBER Vec value(Vec x) { return x * normal_cdf<kFast>(x); }

    static VITFAST_INLINE_MEMBER void value_and_slope(Vec x, Vec* value, Vec* slope) {
        const Vec cdf = normal_cdf<kFast>(x);
        const Vec density = exp2<kFast>(x * x * (-0.5f * kLog2E)) * 0.3989422804014327f;
        *value = x * cdf;
        *slope = fma(x, density, cdf);
    }
};

// sigmoid(y) and sigmoid(-y), each with the relative error of exp2; kFast: sigmoid(-y) with the absolute error of
// fast_logistic.
template <bool kFast>
VITFAST_INLINE Vec sigmoid(Vec y, Vec* one_minus) {
    if constexpr (kFast) {
        const Vec value = fast_logistic(y * -kLog2E);
        *one_minus = 1.0f - value;
        return value;
    }
    const Vec e = exp2((y < 0.0f ? y : -y) * kLog2E);  // in (0, 1]
    const Vec large = 1.0f / (1.0f + e), small = e * large;
    *one_minus = y < 0.0f ? large : small;
    return y < 0.0f ? small : large;
}

// The tanh approximation: x * (1 + tanh(u)) / 2 = x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3).
template <bool kFast>
struct GeluTanh {
    static VITFAST_INLINE_MEMBER Vec twice_u(Vec x) {
        return x * fma(x * x, broadcast(0.07135481627f), broadcast(1.595769121605731f));
    }

    static VITFAST_INLINE_MEMBER Vec value(Vec x) {
        Vec one_minus;
        return x * sigmoid<kFast>(twice_u(x), &one_minus);
    }

    static VITFAST_INLINE_MEMBER void value_and_slope(Vec x, Vec* value, Vec* slope) {
        Vec one_minus;
        const Vec s = sigmoid<kFast>(twice_u(x), &one_minus);
        const Vec twice_du = fma(x * x, broadcast(0.2140644488f), broadcast(1.595769121605731f));
        *value = x * s;
        *slope = fma(x * s, one_minus * twice_du, s);
    }
};

// x * sigmoid(b x): SiLU (Elfwing et al., 2017) for b = 1, and for b = 1.702 the quick GELU of CLIP.
template <bool kQuick, bool kFast>
struct Silu {
    static constexpr float kFactor = kQuick ? 1.702f : 1.0f;

    static VITFAST_INLINE_MEMBER Vec value(Vec x) {
        Vec one_minus;
        return x * sigmoid<kFast>(x * kFactor, &one_minus);
    }

    static VITFAST_INLINE_MEMBER void value_and_slope(Vec x, Vec* value, Vec* slope) {
        Vec one_minus;
        const Vec s = sigmoid<kFast>(x * kFactor, &one_minus);
        *value = x * s;
        *slope = fma(x * s, one_minus * kFactor, s);
    }
};
