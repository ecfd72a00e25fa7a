#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "check.h"
#include "isa.h"

// What attention's forward and backward share. Shapes: T rows of all sequences together, S sequences, H heads,
// E head dim, L = max_seqlen.
namespace vitfast {

// The additive bias [Bb, Hb, L, L], Bb in {1, S}, Hb in {1, H}; at most one of the pointers is set.
struct AttentionBias {
    const float* as_float = nullptr;
    const bf16* as_bf16 = nullptr;
    int64_t batches = 1, heads = 1, length = 0;

    int64_t slice(int64_t sequence, int64_t head) const {
        return (batches == 1 ? 0 : sequence) * heads + (heads == 1 ? 0 : head);
    }
};

// Where one (sequence, head) finds its rows in qkv[T, 3, H, E], out[T, H, E] and lse[H, T].
struct HeadOfSequence {
    int64_t sequence, head, start, length;
};

template <class Y>
struct AttentionForward {
    const Y* qkv;
    AttentionBias bias;
    Y* out;
    float* lse;
    float scale;
    int64_t rows, heads, head_dim;
};

template <class Y>
struct AttentionBackward {
    const Y *d_out, *qkv, *out;
    const float* lse;
    AttentionBias bias;
    Y* d_qkv;
    float scale;
    int64_t rows, heads, head_dim;
};

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
        if (used_ > words_) fail("internal error: attention scratch of ", words_, " words is too small");
        return part;
    }

  private:
    static constexpr int64_t kSlack = 1024;  // rounding of each part to whole cache lines
    uint32_t* data_;
    int64_t words_, used_ = 0;
};

// Checked sizes and the work list of one call.
struct AttentionShape {
    int64_t rows, heads, head_dim, longest;  // longest: of the sequences there are, at most max_seqlen
    std::vector<HeadOfSequence> items;       // sequences of length 0 left out
};

AttentionShape check_attention(const Tensor& qkv, const OptionalTensor& bias, const Tensor& cu_seqlens,
                               int64_t max_seqlen);
AttentionBias bias_of(const OptionalTensor& bias);

}  // namespace vitfast
