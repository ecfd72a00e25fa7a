#include "int8_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "check.h"
#include "forward.h"
#define VITFAST_WITH_VNNI
#include "isa.h"
#include "scratch.h"
#include "shares.h"
#include "tile_linear.h"

// Linear layers in 8-bit integers: weights scaled per output, rows of x scaled one by one when they arrive. Shapes:
// T rows, I inputs (contracted), W = I / 4 rounded up words of 4 numbers, O outputs.
namespace vitfast {

constexpr float kLeastMagnitude = 1e-30f;  // so that 127 / magnitude is finite; a row of less becomes 0
constexpr int64_t kMostInputs = 65536;     // 255 * 127 * I fits 32 bits
constexpr int64_t kBlockRows = 224;        // what a panel read from L3 serves; 197 tokens are one block

template <class X>
struct QuantizeRows {
    const X* x;
    int64_t width, pitch;                  // pitch: W words in bytes
    const float *norm_weight, *norm_bias;  // null, or LayerNorm first
    float eps;
    uint8_t* q;
    float* scale;
};

}  // namespace vitfast

#define VITFAST_KERNEL "int8_linear_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

constexpr auto kFloat = ScalarType::Float;
constexpr auto kBFloat16 = ScalarType::BFloat16;
constexpr auto kCpu = Device::kCpu;

constexpr int64_t kLeastRows = 24;  // of a block, where there would be fewer items than threads
constexpr int64_t kItems = 4;       // per thread: none is idle for long at the end

template <class Run>
void with_dtype(const Tensor& x, const Run& run) {
    if (x.scalar_type() == kFloat) {
        run(float{});
    } else {
        run(bf16{});
    }
}

template <class X>
void quantize(const QuantizeRows<X>& args, int64_t rows) {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(args.width, 1));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> row(args.norm_weight ? args.width : 0);
        VITFAST_DISPATCH(quantize_rows(args, begin, end, row.data()));
    });
}

template <class Y>
void multiply(const Int8Product<Y>& args) {
    if (has_tiles()) return multiply_by_tiles(args, args.packed);
    const int64_t panels = panels_of(args.outputs), threads = torch::stable::get_num_threads();
    if (args.rows == 0 || panels == 0) return;
    int64_t blocks = (args.rows + kBlockRows - 1) / kBlockRows;
    if (blocks * panels < threads * kItems) {
        const int64_t most = std::max<int64_t>(1, args.rows / kLeastRows);
        blocks = std::max(blocks, std::min(most, (threads * kItems + panels - 1) / panels));
    }
    const int64_t parts = std::min(panels, (threads * kItems + blocks - 1) / blocks), items = blocks * parts;
    const int64_t workers = std::min(threads, items);
    Shares shares(items, workers);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t thread, int64_t) {
        Scratch scratch(kBlockRows * kPanelColumns);
        int32_t* const sums = scratch.take<int32_t>(kBlockRows * kPanelColumns);
        for (int64_t i; shares.take(thread, &i);) {
            const int64_t block = i / parts, part = i % parts;
            const int64_t begin = args.rows * block / blocks, end = args.rows * (block + 1) / blocks;
            VITFAST_DISPATCH(multiply_int8(args, begin, end, panels * part / parts, panels * (part + 1) / parts, sums));
        }
    });
}

}  // namespace

// out[T, O] = act(y), or residual[T, O] + scale[O] * y, of y = x[T, I] w^T + bias[O] with w = weight_scale[O] * an
// integer of -127..127 and the rows of x, after LayerNorm where norm_weight[I] is given, rounded to 255 levels each.
// packed: the integers, 4 to a word, in panels of kPanelColumns outputs [W][columns], the columns of the last rounded
// up to kPanelStep; or, by AMX's tiles, as tile_pack.h says. What is beyond I and O is 0. start: -128 * each output's
// sum of integers, as long as the panels.
void int8_linear(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, double eps, Tensor packed,
                 Tensor start, Tensor weight_scale, OptionalTensor bias, std::string activation,
                 OptionalTensor residual, OptionalTensor scale, Tensor out) {
    check("x", x, kCpu, {kFloat, kBFloat16}, {-1, -1});
    check("weight_scale", weight_scale, kCpu, {kFloat}, {-1});
    const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight_scale.size(0), words = (inputs + 3) / 4;
    if (inputs > kMostInputs) fail("x has ", inputs, " columns; allowed: up to ", kMostInputs);
    const int64_t columns = (outputs + kPanelStep - 1) / kPanelStep * kPanelStep;
    const int64_t packed_words = has_tiles() ? tile_words<uint8_t>(inputs, outputs) : columns * words;
    check("packed", packed, kCpu, {ScalarType::Int}, {packed_words});
    check("start", start, kCpu, {ScalarType::Int}, {columns});
    check_together("norm_weight", norm_weight, "norm_bias", norm_bias);
    check("norm_weight", norm_weight, kCpu, {kFloat}, {inputs});
    check("norm_bias", norm_bias, kCpu, {kFloat}, {inputs});
    check("out", out, kCpu, {kFloat, kBFloat16}, {rows, outputs});
    check("residual", residual, kCpu, {out.scalar_type()}, {rows, outputs});
    const Finish finish = finish_of(activation);
    if (finish != Finish::kNone && residual.has_value()) fail("residual goes with activation \"none\" only");
    if (!residual.has_value() && scale.has_value()) fail("scale goes with a residual only");

    Scratch scratch(rows * (words + 1));
    uint8_t* const q = scratch.take<uint8_t>(rows * words);
    float* const row_scale = scratch.take<float>(rows);
    with_dtype(x, [&](auto type) {
        using X = decltype(type);
        quantize(QuantizeRows<X>{data<X>(x), inputs, words * 4, data<float>(norm_weight), data<float>(norm_bias),
                                 static_cast<float>(eps), q, row_scale},
                 rows);
    });
    with_dtype(out, [&](auto type) {
        using Y = decltype(type);
        multiply(Int8Product<Y>{q, words * 4, rows, inputs, outputs, data<uint32_t>(packed), data<int32_t>(start),
                                row_scale, data<float>(weight_scale), parameter("bias", bias, outputs),
                                parameter("scale", scale, outputs), finish, data<Y>(residual), mutable_data<Y>(out)});
    });
}

}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) { m.impl("int8_linear", TORCH_BOX(&vitfast::int8_linear)); }
