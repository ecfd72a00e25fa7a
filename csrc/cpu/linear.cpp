#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "forward.h"
#include "isa.h"
#include "scratch.h"
#include "shares.h"
#include "tile_linear.h"

// Matrix products of linear layers with what follows them in the same pass. Shapes: T rows, I inputs (contracted),
// O outputs. The right operand is packed into panels of columns that stay in L2; the left one is read where it lies.
namespace vitfast {

constexpr int64_t kDepth = 1536;     // words of a panel at a time: 384 KiB, with the rows' block inside 1 MiB of L2
constexpr int64_t kBlockRows = 204;  // 34 register tiles: a panel read from L3 serves all of them; 197 tokens are one

// A thread's scratch: one panel, the left operand's block of rows where it is packed, and its sums.
struct Workspace {
    uint32_t *panel, *left;
    float* sums;
};

}  // namespace vitfast

#define VITFAST_KERNEL "linear_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

// A product's work: the rows in `blocks`, the panels in `parts`; an item is one of each.
struct Split {
    int64_t blocks, parts;
};

// Calls run(first row, last row, first panel, last panel, workspace) for each item, in parallel.
template <class X, class Y, class Run>
void for_each_item(const Product<X, Y>& args, Split split, const Run& run) {
    const int64_t panels = panels_of(args.outputs), words = (args.inputs * sizeof(Y) + 3) / 4;
    const int64_t items = split.blocks * split.parts;
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
    Shares shares(items, threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
        const int64_t left = (kBlockRows + kPanelStep) * words;
        Scratch scratch(kPanelColumns * (words + kBlockRows) + left);
        const Workspace workspace{scratch.take<uint32_t>(kPanelColumns * words), scratch.take<uint32_t>(left),
                                  scratch.take<float>(kBlockRows * kPanelColumns)};
        for (int64_t i; shares.take(thread, &i);) {
            const int64_t block = i / split.parts, part = i % split.parts;
            run(args.rows * block / split.blocks, args.rows * (block + 1) / split.blocks, panels * part / split.parts,
                panels * (part + 1) / split.parts, workspace);
        }
    });
}

// One panel per item, for all rows where that keeps the threads equally busy: what every block of rows costs beside its
// product is as much as the product of `extra` rows. Blocks are whole shares of the threads
// where there are rows enough, since rows come from the core that made them.
Split split_panels(int64_t rows, int64_t panels, double extra) {
    constexpr int64_t kLeastRows = 24, kMoreBlocks = 8, kEnoughRows = 64;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t fewest = rows / threads >= kEnoughRows ? threads : 1;
    Split best{std::min(rows, fewest), panels};
    double best_time = std::numeric_limits<double>::infinity();
    for (int64_t blocks = fewest; blocks < fewest + kMoreBlocks && blocks * kLeastRows <= rows; ++blocks) {
        const double turns = (blocks * panels + threads - 1) / threads;
        const double time = turns * (static_cast<double>(rows) / blocks + extra);
        if (time < best_time) best = {blocks, panels};
        best_time = std::min(time, best_time);
    }
    return best;
}

// One block of rows per item, with some of the panels: the left operand may have to be packed for each item.
Split split_rows(int64_t rows, int64_t panels) {
    constexpr int64_t kItems = 8;  // per thread: none is idle for long at the end
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    return {blocks, blocks == 0 ? 0 : std::min(panels, (kItems * threads + blocks - 1) / blocks)};
}

template <class Run>
void with_dtype(const Tensor& x, const Run& run) {
    if (x.scalar_type() == ScalarType::Float) {
        run(float{});
    } else {
        run(bf16{});
    }
}

// 32-bit words of a packed weight [O, I].
int64_t packed_words(int64_t inputs, int64_t outputs, ScalarType dtype) {
    if (has_tiles()) {
        return dtype == ScalarType::Float ? tile_words<float>(inputs, outputs) : tile_words<bf16>(inputs, outputs);
    }
    const int64_t bytes = dtype == ScalarType::Float ? 4 : 2;
    return (inputs * bytes + 3) / 4 * ((outputs + kPanelStep - 1) / kPanelStep * kPanelStep);
}

// All panels of weight[O, I], one after the other, for products with few rows: packing costs them more than memory.
Tensor pack_linear_weight(Tensor weight) {
    check("weight", weight, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {-1, -1});
    const int64_t outputs = weight.size(0), inputs = weight.size(1);
    const int64_t size = packed_words(inputs, outputs, weight.scalar_type());
    const Tensor packed = torch::stable::new_empty(weight, {size}, ScalarType::Int);
    uint32_t* const words = mutable_data<uint32_t>(packed);
    with_dtype(weight, [&](auto type) {
        using Y = decltype(type);
        const RightOperand<Y> right{data<Y>(weight), inputs, outputs, inputs, false};
        if (has_tiles()) return pack_tiles(right, words);
        const int64_t panel_words = (inputs * sizeof(Y) + 3) / 4 * kPanelColumns;
        torch::stable::parallel_for(0, panels_of(outputs), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) VITFAST_DISPATCH(pack_panel(right, i, words + i * panel_words));
        });
    });
    return packed;
}

}  // namespace

// out[T, O] = act(x[T, I] W^T + bias), W = weight[O, I] or, transposed, weight[I, O]. bias[O] and scale[O] are fp32 or
// bf16. before[T, O]: optionally the sum, as the activation sees it. With residual[T, O]: out = residual + drop_path *
// scale * (x W^T + bias), drop_path[B] with T / B rows per sample.
// packed: the weight as pack_linear_weight makes it, or None: then panels of it are packed here.
// in_tiles: x and out in the tiles' order; the tensors x and out then give shape and dtype alone.
void linear(Tensor x, Tensor weight, bool transposed, OptionalTensor packed, OptionalTensor bias,
            std::string activation, OptionalTensor residual, OptionalTensor scale, OptionalTensor drop_path,
            OptionalTensor before, Tensor out, TileRows in_tiles) {
    check("x", x, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {-1, -1});
    const int64_t rows = x.size(0), inputs = x.size(1);
    const ScalarType narrow = x.scalar_type(), wide = residual.has_value() ? residual->scalar_type() : narrow;
    if (transposed) {
        check("weight", weight, Device::kCpu, {narrow}, {inputs, -1});
    } else {
        check("weight", weight, Device::kCpu, {narrow}, {-1, inputs});
    }
    const int64_t outputs = weight.size(transposed ? 1 : 0);
    check("residual", residual, Device::kCpu, {ScalarType::Float, narrow}, {rows, outputs});
    check("before", before, Device::kCpu, {narrow}, {rows, outputs});
    check("drop_path", drop_path, Device::kCpu, {ScalarType::Float}, {-1});
    check("packed", packed, Device::kCpu, {ScalarType::Int}, {packed_words(inputs, outputs, narrow)});
    check("out", out, Device::kCpu, {wide}, {rows, outputs});
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
        const Product<X, Y> args{data<Y>(x),
                                 false,
                                 rows,
                                 inputs,
                                 outputs,
                                 parameter("bias", bias, outputs),
                                 parameter("scale", scale, outputs),
                                 finish,
                                 mutable_data<Y>(before),
                                 data<X>(residual),
                                 data<float>(drop_path),
                                 samples == 0 ? 1 : rows / samples,
                                 mutable_data<X>(out),
                                 in_tiles};
        const RightOperand<Y> right{data<Y>(weight), weight.size(1), outputs,
                                    inputs,          transposed,     data<uint32_t>(packed)};
        const bool by_rows = !in_tiles.x && !in_tiles.out;
        const bool few = std::is_same_v<Y, float> && !transposed && rows <= kFewRows && by_rows;
        if (has_tiles() && !few) return multiply_by_tiles(args, right);
        const Split split = split_panels(rows, panels_of(outputs), packed.has_value() ? 0 : 7);
        for_each_item(args, split, [&](int64_t begin, int64_t end, int64_t panel, int64_t, const Workspace& workspace) {
            const int64_t next = panel + 1;  // of this thread's share, where it has more
            VITFAST_DISPATCH(pack_and_multiply(args, right, begin, end, panel, next, workspace));
        });
    };
    with_dtype(x, [&](auto y_type) {
        if (wide == ScalarType::Float) {
            run(float{}, y_type);
        } else if constexpr (std::is_same_v<decltype(y_type), bf16>) {
            run(bf16{}, bf16{});
        }
    });
}

namespace {

void linear_op(Tensor x, Tensor weight, bool transposed, OptionalTensor packed, OptionalTensor bias,
               std::string activation, OptionalTensor residual, OptionalTensor scale, OptionalTensor drop_path,
               OptionalTensor before, Tensor out) {
    linear(x, weight, transposed, packed, bias, activation, residual, scale, drop_path, before, out);
}

// d_weight[O, I] = d_out[T, O]^T x[T, I], summed over the rows in their order.
void linear_weight_grad(Tensor d_out, Tensor x, Tensor d_weight) {
    check("d_out", d_out, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {-1, -1});
    const int64_t rows = d_out.size(0), outputs = d_out.size(1);
    check("x", x, Device::kCpu, {d_out.scalar_type()}, {rows, -1});
    const int64_t inputs = x.size(1), panels = panels_of(inputs);
    check("d_weight", d_weight, Device::kCpu, {d_out.scalar_type()}, {outputs, inputs});
    with_dtype(x, [&](auto type) {
        using Y = decltype(type);
        Product<Y, Y> args{};
        args.x = data<Y>(d_out);
        args.transposed = true;
        args.rows = outputs;
        args.inputs = rows;
        args.outputs = inputs;
        args.out = mutable_data<Y>(d_weight);
        RightOperand<Y> right{data<Y>(x), inputs, inputs, rows, true};
        if (has_tiles()) {
            if (inputs > outputs) {  // the wider one on the left, where it is packed a block at a time and stays in L2
                args.out_transposed = true;
                std::swap(args.x, right.x);
                std::swap(args.rows, args.outputs);
                right.row_stride = right.outputs = args.outputs;
            }
            return multiply_by_tiles(args, right);
        }
        const int64_t panel_words = (rows * sizeof(Y) + 3) / 4 * kPanelColumns;
        Scratch packed(panels * panel_words);
        uint32_t* const words = packed.take<uint32_t>(panels * panel_words);
        torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) VITFAST_DISPATCH(pack_panel(right, i, words + i * panel_words));
        });
        for_each_item(args, split_rows(outputs, panels),
                      [&](int64_t begin, int64_t end, int64_t first, int64_t last, const Workspace& workspace) {
                          VITFAST_DISPATCH(multiply_packed(args, words, begin, end - begin, first, last, workspace));
                      });
    });
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) {
    m.impl("linear", TORCH_BOX(&vitfast::linear_op));
    m.impl("pack_linear_weight", TORCH_BOX(&vitfast::pack_linear_weight));
    m.impl("linear_weight_grad", TORCH_BOX(&vitfast::linear_weight_grad));
}
