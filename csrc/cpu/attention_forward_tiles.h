// Attention forward in fp32 on AMX's tiles: the operands of a head and of a block of its queries, and their products.
// Included by attention_forward_kernel.h where VITFAST_AMX.
#include "attention_tiles.h"

class PartForward {
  public:
    float *sums, *out;  // of weights [block]; out[block][out_pitch] before the division by them
    int64_t out_pitch;
    float *prepared_keys, *prepared_queries;

    PartForward(Scratch& scratch, int64_t block, int64_t longest, int64_t length, int64_t head_dim)
        : out_pitch(sums_pitch(head_dim)),
          head_dim_(head_dim),
          length_(length),
          width_steps_(tile_steps<float>(head_dim)),
          key_steps_(tile_steps<float>(length)),
          logits_pitch_(sums_pitch(length)) {
        scratch.reset();
        keys_ = scratch.take<uint32_t>(tile_words<float>(head_dim, longest));
        values_ = scratch.take<uint32_t>(tile_words<float>(longest, head_dim));
        queries_ = scratch.take<uint32_t>(tile_words<float>(head_dim, block));
        weights_ = scratch.take<uint32_t>(tile_words<float>(longest, block));
        logits_ = scratch.take<float>(block * sums_pitch(longest));
        out = scratch.take<float>(block * out_pitch);
        sums = scratch.take<float>(block);
        prepared_keys = scratch.take<float>(longest * head_dim);
        prepared_queries = scratch.take<float>(block * head_dim);
    }

    void pack_keys(const float* k, int64_t stride) { pack_lines<true, true>(k, stride, length_, head_dim_, keys_); }

    void pack_values(const float* v, int64_t stride) {
        pack_lines<false, true>(v, stride, head_dim_, length_, values_);
    }

    void make_logits(const float* q, int64_t stride, int64_t count) {
        pack_lines<true, false>(q, stride, count, head_dim_, queries_);
        const int64_t pitch = width_steps_ * kTileStep<float>;
        products_.multiply({queries_, pitch}, {keys_, pitch}, count, length_, width_steps_, logits_, logits_pitch_,
                           false);
    }

    float* logits(int64_t i) { return logits_ + i * logits_pitch_; }

    // The weights of row i; returns their sum.
    float softmax(int64_t i, float unit, float* largest) {
        const float* const row = logits(i);
        const int64_t columns = round_to_lanes(length_);
        *largest = largest_logit(row, columns);
        const Vec centre = broadcast(softmax_centre(*largest)), to_log2 = broadcast(unit * kLog2E);
        uint32_t* to = weights_ + i / kTileLines * key_steps_ * kTileStep<float> +
                       i % kTileLines * kTile;  // a block's two tiles follow each other
        Vec sum = {};
        for (int64_t j = 0; j < columns; j += 2 * kLanes, to += kTileStep<float>) {
            const Vec low = exp2((load(row + j) - centre) * to_log2);
            const Vec high = j + kLanes < columns ? exp2((load(row + j + kLanes) - centre) * to_log2) : Vec{};
            sum += low + high;
            Vec parts[3];
            Words<float>::split(low, high, parts);
            store_parts(to, parts);
        }
        return reduce_add(sum);
    }

    void add_values(int64_t count) {
        const int64_t pitch = key_steps_ * kTileStep<float>;
        products_.multiply({weights_, pitch}, {values_, pitch}, count, head_dim_, key_steps_, out, out_pitch, false);
    }

  private:
    int64_t head_dim_, length_, width_steps_, key_steps_, logits_pitch_;
    uint32_t *keys_, *values_, *queries_, *weights_;
    float* logits_;
    PartProducts products_;
};
