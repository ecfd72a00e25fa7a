#pragma once

#include <cstdint>
#include <string>

#include "check.h"
#include "isa.h"
#include "tiles.h"

// What the products of linear layers share: panels of the right operand, and what follows the sums.
namespace vitfast {

constexpr int64_t kPanelColumns = 64;  // 4 vectors of AVX-512, the width of its register tile
constexpr int64_t kPanelStep = 16;     // the last panel's columns are rounded up to this

constexpr int64_t kFewRows = 4;  // of fp32 that are multiplied with the weight as it lies

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanelColumns - 1) / kPanelColumns; }

inline int64_t panel_columns(int64_t outputs, int64_t panel) {
    const int64_t left = outputs - panel * kPanelColumns;
    return left >= kPanelColumns ? kPanelColumns : (left + kPanelStep - 1) / kPanelStep * kPanelStep;
}

// Numbers in fp32 or bf16, or (both null) none.
struct Parameter {
    const float* as_float = nullptr;
    const bf16* as_bf16 = nullptr;

    explicit operator bool() const { return as_float || as_bf16; }
};

enum class Finish { kNone, kGelu, kGeluTanh, kQuickGelu };

inline Parameter numbers_of(const OptionalTensor& x) {
    if (!x.has_value()) return {};
    if (x->scalar_type() == ScalarType::Float) return {data<float>(x), nullptr};
    return {nullptr, data<bf16>(x)};
}

inline Parameter parameter(const char* name, const OptionalTensor& x, int64_t size) {
    check(name, x, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {size});
    return numbers_of(x);
}

inline Finish finish_of(const std::string& activation) {
    if (activation == "none") return Finish::kNone;
    if (activation == "gelu") return Finish::kGelu;
    if (activation == "gelu_tanh") return Finish::kGeluTanh;
    if (activation == "quick_gelu") return Finish::kQuickGelu;
    fail("activation is \"", activation, "\"; allowed: \"none\", \"gelu\", \"gelu_tanh\", \"quick_gelu\"");
}

template <class Y>
struct RightOperand {
    const Y* x;
    int64_t row_stride, outputs, inputs;
    bool transposed;                   // x[inputs, outputs] instead of x[outputs, inputs]
    const uint32_t* packed = nullptr;  // null, or all its panels one after the other
};

template <class X, class Y>
struct Product {
    using Number = Y;  // of the operands
    using Sum = float;
    const Y* x;
    bool transposed;  // x[inputs, rows] instead of x[rows, inputs]
    int64_t rows, inputs, outputs;
    Parameter bias, scale;
    Finish finish;
    Y* before;          // null, or what the activation is applied to
    const X* residual;  // null, or residual + drop_path * scale * product is written
    const float* drop_path;
    int64_t rows_per_sample;
    X* out;
    TileRows in_tiles;            // x and out where they are not row by row
    bool out_transposed = false;  // out[outputs, rows], by tiles alone
};

}  // namespace vitfast
