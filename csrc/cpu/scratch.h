#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "check.h"

namespace vitfast {

// 64-byte aligned scratch, handed out in 32-bit words; one per thread.
class Scratch {
  public:
    explicit Scratch(int64_t words) : words_(words + kSlack) {
        data_ = static_cast<uint32_t*>(std::aligned_alloc(64, (words_ * 4 + 63) / 64 * 64));
        if (!data_) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void reset() { used_ = 0; }

    template <class T>
    T* take(int64_t words) {
        T* const part = reinterpret_cast<T*>(data_ + used_);
        used_ += (words + 15) / 16 * 16;
        if (used_ > words_) fail("internal error: scratch of ", words_, " words is too small");
        return part;
    }

  private:
    static constexpr int64_t kSlack = 1024;  // rounding of each part to whole cache lines
    uint32_t* data_;
    int64_t words_, used_ = 0;
};

}  // namespace vitfast
