#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

// Argument checks shared by the CPU and CUDA kernels. Every message names the argument, what came and what is allowed.
namespace vitfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum class Device { kCpu, kCuda };

// Raises std::runtime_error (a RuntimeError in Python) with a message made of the parts.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

template <class List>
std::string show(const List& values) {
    std::ostringstream text;
    text << "[";
    bool first = true;
    for (const auto& value : values) {
        text << (first ? "" : ", ") << value;
        first = false;
    }
    text << "]";
    return text.str();
}

inline std::string show_shape(const Tensor& tensor) { return show(tensor.sizes()); }

// Device and dtype; the tensor may have any strides.
inline void check_kind(const char* name, const Tensor& tensor, Device device,
                       std::initializer_list<ScalarType> dtypes) {
    const bool here = device == Device::kCpu ? tensor.is_cpu() : tensor.is_cuda();
    if (!here) fail(name, " must be a ", device == Device::kCpu ? "CPU" : "CUDA", " tensor");
    for (const ScalarType dtype : dtypes) {
        if (tensor.scalar_type() == dtype) return;
    }
    fail(name, " has dtype ", tensor.scalar_type(), "; allowed: ", show(dtypes));
}

// Device, dtype, contiguity and the whole shape; -1 in the shape allows any size there.
inline void check(const char* name, const Tensor& tensor, Device device, std::initializer_list<ScalarType> dtypes,
                  std::initializer_list<int64_t> shape) {
    check_kind(name, tensor, device, dtypes);
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    int64_t axis = 0;
    for (const int64_t size : shape) {
        if (!same) break;
        same = size == -1 || tensor.size(axis) == size;
        ++axis;
    }
    if (!same) fail(name, " has shape ", show_shape(tensor), "; needed: ", show(shape), " (-1: any)");
    if (!tensor.is_contiguous()) fail(name, " must be contiguous; its strides are ", show(tensor.strides()));
}

inline void check(const char* name, const OptionalTensor& tensor, Device device,
                  std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> shape) {
    if (tensor.has_value()) check(name, *tensor, device, dtypes, shape);
}

// Two optional arguments that are given together or not at all.
inline void check_together(const char* name, const OptionalTensor& tensor, const char* other_name,
                           const OptionalTensor& other) {
    if (tensor.has_value() == other.has_value()) return;
    fail(name, " is ", tensor.has_value() ? "given" : "None", " but ", other_name, " is ",
         other.has_value() ? "given" : "None", "; give both or neither");
}

template <class T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const OptionalTensor& tensor) {
    return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* mutable_data(const OptionalTensor& tensor) {
    return tensor.has_value() ? mutable_data<T>(*tensor) : nullptr;
}

}  // namespace vitfast
