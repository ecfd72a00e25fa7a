// What every CUDA operator needs around its kernels: the tensors' device, its current stream, the launch check,
// argument checks that also compare devices, and the choice of types. The only file here that knows both CUDA and
// PyTorch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "check.h"
#include "vector_io.h"

namespace vitfast::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail(what, " failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
}

// Makes the device of `tensor` current for its lifetime and launches kernels on that device's current stream.
class Launcher {
  public:
    explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        const int device = tensor.get_device_index();
        void* stream = nullptr;
        // asked without the headers' own macro for it, whose name differs between PyTorch 2.11 and 2.14
        if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) fail("no current CUDA stream on cuda:", device);
        stream_ = static_cast<cudaStream_t>(stream);
        check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device),
                   "cudaDeviceGetAttribute(multiprocessor count)");
    }

    int multiprocessors() const { return multiprocessors_; }

    template <typename... Params, typename... Arguments>
    void operator()(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, const Arguments&... arguments) {
        kernel<<<grid, block, 0, stream_>>>(arguments...);
        const cudaError_t error = cudaGetLastError();
        if (error == cudaSuccess) return;
        fail("launch of CUDA kernel ", name, " failed (grid ", grid.x, " x ", grid.y, ", ", block.x,
             " threads): ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
    }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
    int multiprocessors_ = 0;
};

// check.h's checks for tensors that must share one CUDA device, the first one's.
class Arguments {
  public:
    Arguments(const char* first_name, const Tensor& first) : first_name_(first_name), first_(first) {}

    void check_kind(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes) const {
        vitfast::check_kind(name, tensor, Device::kCuda, dtypes);
        if (tensor.get_device_index() != first_.get_device_index()) {
            fail(name, " is on cuda:", tensor.get_device_index(), " but ", first_name_,
                 " is on cuda:", first_.get_device_index(), "; all arguments must be on one device");
        }
    }

    void check(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes,
               std::initializer_list<int64_t> shape) const {
        check_kind(name, tensor, dtypes);
        vitfast::check(name, tensor, Device::kCuda, dtypes, shape);
    }

    void check(const char* name, const OptionalTensor& tensor, std::initializer_list<ScalarType> dtypes,
               std::initializer_list<int64_t> shape) const {
        if (tensor.has_value()) check(name, *tensor, dtypes, shape);
    }

    // drop_path[B]: rows per sample, or all rows without it.
    int64_t rows_per_sample(const OptionalTensor& drop_path, int64_t rows) const {
        check("drop_path", drop_path, {ScalarType::Float}, {-1});
        const int64_t samples = drop_path.has_value() ? drop_path->numel() : 1;
        if (samples == 0 ? rows != 0 : rows % samples != 0) {
            fail("drop_path has ", samples, " samples; the number of rows, ", rows, ", must be a multiple of it");
        }
        return samples == 0 || rows == 0 ? 1 : rows / samples;
    }

  private:
    const char* first_name_;
    const Tensor& first_;
};

// Calls run(Y{}) for the compute dtype of `tensor`.
template <typename Run>
void with_dtype(const char* name, const Tensor& tensor, const Run& run) {
    check_kind(name, tensor, Device::kCuda, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    switch (tensor.scalar_type()) {
        case ScalarType::BFloat16:
            return run(BFloat16{});
        case ScalarType::Half:
            return run(Half{});
        default:
            return run(float{});
    }
}

// Calls run(X{}, Y{}) for the residual stream's dtype X, which is Y or Float.
template <typename Run>
void with_dtypes(const char* x_name, const Tensor& x, const char* y_name, const Tensor& y, const Run& run) {
    check_kind(x_name, x, Device::kCuda, {ScalarType::Float, y.scalar_type()});
    const bool mixed = x.scalar_type() != y.scalar_type();
    with_dtype(y_name, y, [&](auto y_type) {
        using Y = decltype(y_type);
        mixed ? run(float{}, Y{}) : run(Y{}, Y{});
    });
}

// A width that kernels keep in an int. `most` leaves room for the index of the last lane.
inline int checked_width(const char* name, int64_t width, int64_t most) {
    if (width > most) fail(name, " has ", width, " columns; the CUDA kernel allows at most ", most);
    return static_cast<int>(width);
}

constexpr int64_t kMostColumns = int64_t{1} << 30;

}  // namespace vitfast::cuda
