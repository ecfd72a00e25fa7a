#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vitfast {

// Column sums over rows in two stages: each chunk of rows into a partial sum of its own, then the partial sums in the
// order of the chunks. The chunks depend on the shape alone, so the bits are the same for any number of threads.
class ColumnSums {
  public:
    ColumnSums(int64_t rows, int64_t width)
        : rows_(rows),
          width_(width),
          chunk_rows_(std::max<int64_t>(32, (rows + 63) / 64)),
          chunks_((rows + chunk_rows_ - 1) / chunk_rows_),
          partial_(chunks_ * width) {}

    // Calls add(first_row, last_row, sums[width], zero at first) for every chunk, in parallel.
    template <class Add>
    void accumulate(const Add& add) {
        torch::stable::parallel_for(0, chunks_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                const int64_t first = chunk * chunk_rows_;
                add(first, std::min(rows_, first + chunk_rows_), partial_.data() + chunk * width_);
            }
        });
    }

    // out[width] = the sums of columns [column, column + width).
    void finish(float* out, int64_t column, int64_t width) const {
        torch::stable::parallel_for(0, width, 1024, [&](int64_t begin, int64_t end) {
            std::fill(out + begin, out + end, 0.0f);
            for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
                const float* sums = partial_.data() + chunk * width_ + column;
                for (int64_t i = begin; i < end; ++i) out[i] += sums[i];
            }
        });
    }

  private:
    int64_t rows_, width_, chunk_rows_, chunks_;
    std::vector<float> partial_;
};

}  // namespace vitfast
