#pragma once

#include <cstdint>

#include "check.h"

namespace vitfast {

// 64-byte aligned memory for as long as the object lives, which the thread keeps for the next one: fresh memory costs a
// page fault for every 4 KiB, and small products less than that.
class KeptMemory {
  public:
    explicit KeptMemory(int64_t bytes);
    ~KeptMemory();
    KeptMemory(const KeptMemory&) = delete;
    KeptMemory& operator=(const KeptMemory&) = delete;

    void* data() const { return data_; }

  private:
    void* data_;
    int64_t bytes_;
};

// Scratch, handed out in 32-bit words; one per thread.
class Scratch {
  public:
    explicit Scratch(int64_t words) : words_(words + kSlack), memory_(words_ * 4) {}

    void reset() { used_ = 0; }

    template <class T>
    T* take(int64_t words) {
        T* const part = reinterpret_cast<T*>(static_cast<uint32_t*>(memory_.data()) + used_);
        used_ += (words + 15) / 16 * 16;
        if (used_ > words_) fail("internal error: scratch of ", words_, " words is too small");
        return part;
    }

  private:
    static constexpr int64_t kSlack = 1024;  // rounding of each part to whole cache lines
    int64_t words_, used_ = 0;
    KeptMemory memory_;
};

}  // namespace vitfast
