#pragma once

#include <cstdint>
#include <string>

#include "check.h"

// What happens to q and k between the projection and attention. Shapes: T rows of all sequences, E head dim, N rotated
// tokens.
namespace vitfast {

constexpr int64_t kMostHeadDim = 256;

enum class HeadNormKind { kNone, kLayerNorm, kRmsNorm };

struct HeadNorm {
    HeadNormKind kind = HeadNormKind::kNone;
    const float *weight = nullptr, *bias = nullptr;  // [E], or null
    float eps = 0.0f;
};

struct HeadOptions {
    const float *cos = nullptr, *sin = nullptr;  // [N, columns], columns E or E / 2 (one angle for each pair)
    int64_t rotated = 0, columns = 0;
    bool interleaved = false;  // pairs (2i, 2i + 1), else (i, i + E / 2)
    bool row_by_row = false;   // the tables have a row for each of the T rows, else for the last N of each sequence
    HeadNorm norms[2];         // of q and of k

    bool active(int which) const { return cos || norms[which].kind != HeadNormKind::kNone; }

    // The row of the tables for token `token` of a sequence; negative where the token does not turn.
    int64_t table_row(int64_t start, int64_t length, int64_t token) const {
        return row_by_row ? start + token : token - (length - rotated);
    }
};

// The optional arguments of both operators, as they arrive.
struct HeadArguments {
    const OptionalTensor &cos, &sin;
    bool interleaved;
    const std::string &q_norm, &k_norm;
    const OptionalTensor &q_weight, &q_bias, &k_weight, &k_bias;
    double q_eps, k_eps;
};

HeadOptions check_heads(const HeadArguments& arguments, int64_t rows, int64_t head_dim);

}  // namespace vitfast
