#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace vitfast {

// Hands out the items 0 to `items` - 1: to each thread those of its own share, in order, and then what others have
// left. Where items follow the rows of a matrix, a thread mostly finds the rows in its L2 that it made in the op
// before; from another core's L2 they would come at a fraction of the rate.
class Shares {
  public:
    Shares(int64_t items, int64_t threads) : items_(items), threads_(threads), next_(threads) {
        for (int64_t t = 0; t < threads; ++t) next_[t].at = begin(t);
    }

    // The next item for a thread; false when there is none.
    bool take(int64_t thread, int64_t* item) {
        for (int64_t i = 0; i < threads_; ++i) {
            const int64_t share = (thread + i) % threads_;
            *item = next_[share].at++;
            if (*item < begin(share + 1)) return true;
        }
        return false;
    }

  private:
    struct alignas(64) Counter {
        std::atomic<int64_t> at{0};
    };

    int64_t begin(int64_t share) const { return items_ * share / threads_; }

    int64_t items_, threads_;
    std::vector<Counter> next_;
};

}  // namespace vitfast
