// Products of packed blocks by AMX's tiles. Included by kernels after tile_pack.h.

// Tiles: see amx_tiles.h. They are loaded as soon as the last product that needs the old ones has begun.
#define VITFAST_UPPER(part) _tile_loadd(4, a + (part) * kPartWords, 64);
#define VITFAST_LOWER(part) \
    if constexpr (kLower) _tile_loadd(5, a + (part) * kPartWords + kTileWords, 64);
#define VITFAST_LEFT(part) _tile_loadd(6, b + (part) * kPartWords, 64);
#define VITFAST_RIGHT(part) \
    if constexpr (kRight) _tile_loadd(7, b + (part) * kPartWords + kTileWords, 64);
#define VITFAST_UPPER_LEFT _tile_dpbf16ps(0, 4, 6);
#define VITFAST_UPPER_RIGHT \
    if constexpr (kRight) _tile_dpbf16ps(1, 4, 7);
#define VITFAST_LOWER_LEFT \
    if constexpr (kLower) _tile_dpbf16ps(2, 5, 6);
#define VITFAST_LOWER_RIGHT \
    if constexpr (kLower && kRight) _tile_dpbf16ps(3, 5, 7);

// The sums in tiles 0 to 3, and the products of `steps` steps of fp32's parts.
template <bool kLower, bool kRight, class Between>
VITFAST_INLINE void add_products(float, const uint32_t* a, const uint32_t* b, int64_t steps, Between& between) {
    if (steps > 0) {
        VITFAST_UPPER(0) VITFAST_LEFT(2) VITFAST_LOWER(0) VITFAST_RIGHT(2)
    }
    // clang-format off
    for (int64_t step = 0; step < steps; ++step) {
        // part 0 of A with 2 of B
        VITFAST_UPPER_LEFT  between.fetch(); VITFAST_LOWER_LEFT  VITFAST_LEFT(1)
        VITFAST_UPPER_RIGHT between.fetch(); VITFAST_LOWER_RIGHT VITFAST_RIGHT(1)
        // 0 with 1
        VITFAST_UPPER_LEFT  between.fetch(); VITFAST_LOWER_LEFT VITFAST_UPPER_RIGHT VITFAST_UPPER(1)
        VITFAST_LOWER_RIGHT between.fetch(); VITFAST_LOWER(1)
        // 1 with 1
        VITFAST_UPPER_LEFT  VITFAST_LOWER_LEFT  between.fetch(); VITFAST_LEFT(0)
        VITFAST_UPPER_RIGHT VITFAST_LOWER_RIGHT between.fetch(); VITFAST_RIGHT(0)
        // 1 with 0
        VITFAST_UPPER_LEFT  VITFAST_LOWER_LEFT  between.fetch(); VITFAST_UPPER_RIGHT VITFAST_UPPER(2)
        VITFAST_LOWER_RIGHT between.fetch(); VITFAST_LOWER(2)
        // 2 with 0
        VITFAST_UPPER_LEFT  VITFAST_LOWER_LEFT  VITFAST_UPPER_RIGHT VITFAST_UPPER(0)
        VITFAST_LOWER_RIGHT VITFAST_LOWER(0)
        between.finish(step);
        a += kTileStep<float>;
        b += kTileStep<float>;
        // 0 with 0
        const bool more = step + 1 < steps;
        VITFAST_UPPER_LEFT  VITFAST_LOWER_LEFT  if (more) { VITFAST_LEFT(2) }
        VITFAST_UPPER_RIGHT if (more) { VITFAST_UPPER(0) }
        VITFAST_LOWER_RIGHT if (more) { VITFAST_LOWER(0) VITFAST_RIGHT(2) }
    }
    // clang-format on
}

#define VITFAST_DOT(sum, left, right)                \
    if constexpr (std::is_same_v<Number, uint8_t>) { \
        _tile_dpbusd(sum, left, right);              \
    } else {                                         \
        _tile_dpbf16ps(sum, left, right);            \
    }

// The same of bf16, or of 8-bit integers.
template <bool kLower, bool kRight, class Number, class Between>
VITFAST_INLINE void add_products(Number, const uint32_t* a, const uint32_t* b, int64_t steps, Between& between) {
    for (int64_t step = 0; step < steps; ++step) {
        VITFAST_UPPER(0)
        VITFAST_LEFT(0)
        VITFAST_DOT(0, 4, 6)
        between.fetch();
        VITFAST_LOWER(0)
        if constexpr (kLower) VITFAST_DOT(2, 5, 6)
        between.fetch();
        VITFAST_RIGHT(0)
        if constexpr (kRight) VITFAST_DOT(1, 4, 7)
        between.finish(step);
        if constexpr (kLower && kRight) VITFAST_DOT(3, 5, 7)
        a += kTileStep<Number>;
        b += kTileStep<Number>;
    }
}

#undef VITFAST_DOT
#undef VITFAST_UPPER
#undef VITFAST_LOWER
#undef VITFAST_LEFT
#undef VITFAST_RIGHT
#undef VITFAST_UPPER_LEFT
#undef VITFAST_UPPER_RIGHT
#undef VITFAST_LOWER_LEFT
#undef VITFAST_LOWER_RIGHT

// sums[rows, 16 or (kRight) 32 columns] (`pitch` numbers apart) = (or +=) A * B over `steps` steps; rows as configured,
// kLower: more than 16.
template <bool kLower, bool kRight, class Number, class Sum, class Between>
VITFAST_INLINE void multiply_packed(Number number, const uint32_t* a, const uint32_t* b, int64_t steps, Sum* sums,
                                    int64_t pitch, bool add, Between& between) {
    begin_sums<kLower, kRight>(sums, pitch * sizeof(Sum), add);
    add_products<kLower, kRight>(number, a, b, steps, between);
    store_sums<kLower, kRight>(sums, pitch * sizeof(Sum));
}

template <class Number, class Sum, class Between>
VITFAST_INLINE void multiply_packed(Number number, int64_t rows, int64_t columns, const uint32_t* a, const uint32_t* b,
                                    int64_t steps, Sum* sums, int64_t pitch, bool add, Between& between) {
    if (rows > kTile && columns > kTile) {
        multiply_packed<true, true>(number, a, b, steps, sums, pitch, add, between);
    } else if (rows > kTile) {
        multiply_packed<true, false>(number, a, b, steps, sums, pitch, add, between);
    } else if (columns > kTile) {
        multiply_packed<false, true>(number, a, b, steps, sums, pitch, add, between);
    } else {
        multiply_packed<false, false>(number, a, b, steps, sums, pitch, add, between);
    }
}
