// Included by kernels after vec.h.

VITFAST_INLINE Vec load(const Parameter& p, int64_t at, int64_t n) {
    return p.as_float ? load(p.as_float + at, n) : load(p.as_bf16 + at, n);
}
