// What every launcher asks of its tensors before it takes their addresses, and where it launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace longshadow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;
constexpr int64_t kMaxSharedBytes = 99 * 1024;  // of a block, on compute capability 8.6 and 8.9
constexpr int64_t kAnySize = -1;

// Throws std::runtime_error, RuntimeError in Python, with all of `parts` one after the other unless `holds`.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Checks the arguments of one operator, all of which must be on one device; messages begin with its name.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& first) : op_(op), device_(first.get_device_index()) {}

  int32_t device() const { return device_; }

  template <typename... Parts>
  void check(bool holds, const Parts&... parts) const {
    require(holds, op_, ": ", parts...);
  }

  // The address of a contiguous tensor of this dtype and shape.
  template <typename T>
  T* pointer(const Tensor& tensor, const char* name, ScalarType dtype,
             std::initializer_list<int64_t> shape) const {
    check(tensor.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", not ",
          torch::headeronly::toString(tensor.scalar_type()));
    return static_cast<T*>(address(tensor, name, shape));
  }

  // The address of a contiguous tensor of this shape and any dtype, which must begin at a multiple of 16
  // bytes.
  void* vector_pointer(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) const {
    void* data = address(tensor, name, shape);
    check(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, name, " must begin at a multiple of ",
          kAlignment, " bytes");
    return data;
  }

 private:
  void* address(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) const {
    check(tensor.is_cuda() && tensor.get_device_index() == device_, name, " must be on CUDA device ",
          device_);
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
    int64_t dimension = 0;
    for (const int64_t size : shape) {
      fits = fits && (size == kAnySize || tensor.size(dimension) == size);
      ++dimension;
    }
    check(fits, name, " must have the shape ", text(shape), ", not ", text(tensor.sizes()));
    check(tensor.is_contiguous(), name, " must be contiguous");
    return tensor.data_ptr();
  }

  template <typename Sizes>
  static std::string text(const Sizes& sizes) {
    std::ostringstream joined;
    const char* separator = "[";
    for (const int64_t size : sizes) {
      joined << separator;
      if (size == kAnySize) {
        joined << "any";
      } else {
        joined << size;
      }
      separator = ", ";
    }
    joined << (sizes.size() == 0 ? "[]" : "]");
    return joined.str();
  }

  const char* op_;
  int32_t device_;
};

// The stream that torch launches on now.
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Allows `kernel` so many bytes of dynamic shared memory; more than 48 KB have to be asked for.
template <typename Kernel>
void allow_shared_bytes(Kernel* kernel, int64_t bytes) {
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

}  // namespace longshadow
