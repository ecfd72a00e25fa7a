// Products of attention in fp32 by AMX's tiles, three bf16 parts a number (tiles.h). Included by attention_*_tiles.h.
#include "tile_pack.h"
#include "tile_products.h"

// Numbers between rows of sums, an odd multiple of a cache line: rows of a tile then meet in no set of L1.
VITFAST_INLINE int64_t sums_pitch(int64_t columns) { return tile_blocks(columns) * kTileLines + kTile; }

// Packed blocks, `pitch` words apart.
struct PackedBlocks {
    const uint32_t* data;
    int64_t pitch;
};

struct NothingBetween {
    VITFAST_INLINE_MEMBER void fetch() {}
    VITFAST_INLINE_MEMBER void finish(int64_t) {}
};

// Makes products, and gives the tiles back when it goes.
class PartProducts {
  public:
    ~PartProducts() { configure_tiles(0); }

    // sums[rows, columns] (`pitch` numbers apart) = (or +=) A * B over `steps` steps.
    void multiply(PackedBlocks a, PackedBlocks b, int64_t rows, int64_t columns, int64_t steps, float* sums,
                  int64_t pitch, bool add) {
        NothingBetween between;
        for (int64_t i = 0; i < rows; i += kTileLines) {
            const int64_t height = std::min(rows - i, kTileLines);
            if (configured_ != height) configure_tiles(configured_ = height);
            const uint32_t* const left = a.data + i / kTileLines * a.pitch;
            for (int64_t j = 0; j < columns; j += kTileLines) {
                multiply_packed(float{}, height, columns - j, left, b.data + j / kTileLines * b.pitch, steps,
                                sums + i * pitch + j, pitch, add, between);
            }
        }
    }

  private:
    int64_t configured_ = 0;
};
