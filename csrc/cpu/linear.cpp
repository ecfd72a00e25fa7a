#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "check.h"
#include "isa.h"
#include "scratch.h"

// Matrix products of linear layers with what follows them in the same pass. Shapes: T rows, I inputs (contracted),
// O outputs. The right operand is packed into panels of columns, by pack_weight; the left one is read where it lies.
namespace vitfast {

constexpr int64_t kPanelColumns = 64;  // 4 vectors of AVX-512, the width of its register tile
constexpr int64_t kPanelStep = 16;     // the last panel's columns are rounded up to this
constexpr int64_t kDepth = 1536;       // words of a panel at a time: 384 KiB, with the rows' block inside 1 MiB of L2
constexpr int64_t kBlockRows = 204;    // 34 register tiles: a panel read from L3 serves all of them; 197 tokens are one

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanelColumns - 1) / kPanelColumns; }

inline int64_t panel_columns(int64_t outputs, int64_t panel) {
    const int64_t left = outputs - panel * kPanelColumns;
    return left >= kPanelColumns ? kPanelColumns : (left + kPanelStep - 1) / kPanelStep * kPanelStep;
}

// A vector of fp32 or bf16 numbers, or (both null) none.
struct Parameter {
    const float* as_float = nullptr;
    const bf16* as_bf16 = nullptr;
};

enum class Finish { kNone, kGelu, kGeluTanh };

template <class Y>
struct Packing {
    const Y* x;
    int64_t row_stride, outputs, inputs;
    bool transposed;  // x[inputs, outputs] instead of x[outputs, inputs]
    uint32_t* words;
};

template <class X, class Y>
struct Product {
    const Y* x;
    bool transposed;  // x[inputs, rows] instead of x[rows, inputs]
    const uint32_t* packed;
    int64_t rows, inputs, outputs;
    Parameter bias, scale;
    Finish finish;
    Y* before;          // null, or what the activation is applied to
    const X* residual;  // null, or residual + drop_path * scale * product is written
    const float* drop_path;
    int64_t rows_per_sample;
    X* out;
};

}  // namespace vitfast

#define VITFAST_KERNEL "linear_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

int64_t per_word(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 ? 2 : 1; }

// Numbers of a packed operand: whole words along the contracted axis, whole steps of columns.
int64_t packed_numbers(const Tensor& like, int64_t outputs, int64_t inputs) {
    const int64_t pairs = per_word(like);
    return (outputs + kPanelStep - 1) / kPanelStep * kPanelStep * ((inputs + pairs - 1) / pairs * pairs);
}

// packed = the right operand of a product with weight[O, I]^T or, transposed, with weight[I, O]. Its size is
// O rounded up to 16, times I (bf16: rounded up to 2).
void pack_weight(Tensor weight, bool transposed, Tensor packed) {
    check("weight", weight, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {-1, -1});
    const int64_t outputs = weight.size(transposed ? 1 : 0), inputs = weight.size(transposed ? 0 : 1);
    check("packed", packed, Device::kCpu, {weight.scalar_type()}, {packed_numbers(weight, outputs, inputs)});
    const auto run = [&](auto type) {
        using Y = decltype(type);
        const Packing<Y> args{data<Y>(weight), weight.size(1), outputs,
                              inputs,          transposed,     mutable_data<uint32_t>(packed)};
        torch::stable::parallel_for(0, panels_of(outputs), 1, [&](int64_t begin, int64_t end) {
            for (int64_t panel = begin; panel < end; ++panel) VITFAST_DISPATCH(pack_panel(args, panel));
        });
    };
    if (weight.scalar_type() == ScalarType::Float) {
        run(float{});
    } else {
        run(bf16{});
    }
}

Parameter parameter(const char* name, const OptionalTensor& x, int64_t size) {
    check(name, x, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {size});
    if (!x.has_value()) return {};
    if (x->scalar_type() == ScalarType::Float) return {data<float>(x), nullptr};
    return {nullptr, data<bf16>(x)};
}

Finish finish_of(const std::string& activation) {
    if (activation == "none") return Finish::kNone;
    if (activation == "gelu") return Finish::kGelu;
    if (activation == "gelu_tanh") return Finish::kGeluTanh;
    fail("activation is \"", activation, "\"; allowed: \"none\", \"gelu\", \"gelu_tanh\"");
}

// Blocks of rows times parts of the panels, about 16 items per thread: the threads stay busy to the end.
struct Split {
    int64_t blocks, parts;

    Split(int64_t rows, int64_t panels) {
        constexpr int64_t kItems = 16, kLeastRows = 24;
        const int64_t wanted = kItems * torch::stable::get_num_threads();
        blocks = (rows + kBlockRows - 1) / kBlockRows;
        parts = blocks == 0 ? 0 : std::min(panels, (wanted + blocks - 1) / blocks);
        if (parts > 0 && blocks * parts < wanted) {
            blocks = std::max(blocks, std::min((wanted + parts - 1) / parts, rows / kLeastRows));
        }
    }
};

template <class X, class Y>
void run_product(const Product<X, Y>& args) {
    const int64_t panels = panels_of(args.outputs), words = (args.inputs * sizeof(Y) + 3) / 4;
    const Split split(args.rows, panels);
    const int64_t items = split.blocks * split.parts, left_words = (kBlockRows + kPanelStep) * words;
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        Scratch scratch(kBlockRows * kPanelColumns + left_words);
        float* const sums = scratch.take<float>(kBlockRows * kPanelColumns);
        uint32_t* const left = scratch.take<uint32_t>(left_words);
        for (int64_t i = next++; i < items; i = next++) {
            const int64_t block = i / split.parts, part = i % split.parts;
            const int64_t begin = args.rows * block / split.blocks, end = args.rows * (block + 1) / split.blocks;
            const int64_t first = panels * part / split.parts, last = panels * (part + 1) / split.parts;
            VITFAST_DISPATCH(multiply_panels(args, begin, end - begin, first, last, left, sums));
        }
    });
}

// out[T, O] = act(x W^T + bias), with W packed by pack_weight. before[T, O]: optionally the sum, as the activation sees
// it. With residual[T, O]: out = residual + drop_path * scale * (x W^T + bias), drop_path[B] with T / B rows per
// sample. x is [T, I] or, transposed, [I, T]. bias[O] and scale[O] are fp32 or bf16.
void packed_linear(Tensor x, bool transposed, Tensor packed, OptionalTensor bias, std::string activation,
                   OptionalTensor residual, OptionalTensor scale, OptionalTensor drop_path, OptionalTensor before,
                   Tensor out) {
    check("x", x, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {-1, -1});
    const int64_t rows = x.size(transposed ? 1 : 0), inputs = x.size(transposed ? 0 : 1);
    const ScalarType narrow = x.scalar_type(), wide = residual.has_value() ? residual->scalar_type() : narrow;
    check("out", out, Device::kCpu, {wide}, {rows, -1});
    const int64_t outputs = out.size(1);
    check("packed", packed, Device::kCpu, {narrow}, {packed_numbers(x, outputs, inputs)});
    check("residual", residual, Device::kCpu, {ScalarType::Float, narrow}, {rows, outputs});
    check("before", before, Device::kCpu, {narrow}, {rows, outputs});
    check("drop_path", drop_path, Device::kCpu, {ScalarType::Float}, {-1});
    const Finish finish = finish_of(activation);
    if (finish != Finish::kNone && residual.has_value()) fail("residual goes with activation \"none\" only");
    if (finish == Finish::kNone && before.has_value()) fail("before goes with an activation only");
    if (!residual.has_value() && (scale.has_value() || drop_path.has_value())) {
        fail("scale and drop_path go with a residual only");
    }
    const int64_t samples = drop_path.has_value() ? drop_path->size(0) : 1;
    if (samples == 0 ? rows != 0 : rows % samples != 0) {
        fail("drop_path has ", samples, " samples, which do not divide the ", rows, " rows of x");
    }
    const auto run = [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        run_product(Product<X, Y>{data<Y>(x), transposed, data<uint32_t>(packed), rows, inputs, outputs,
                                  parameter("bias", bias, outputs), parameter("scale", scale, outputs), finish,
                                  mutable_data<Y>(before), data<X>(residual), data<float>(drop_path),
                                  samples == 0 ? 1 : rows / samples, mutable_data<X>(out)});
    };
    if (narrow == ScalarType::Float) {
        run(float{}, float{});
    } else if (wide == ScalarType::Float) {
        run(float{}, bf16{});
    } else {
        run(bf16{}, bf16{});
    }
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) {
    m.impl("pack_weight", TORCH_BOX(&vitfast::pack_weight));
    m.impl("packed_linear", TORCH_BOX(&vitfast::packed_linear));
}
