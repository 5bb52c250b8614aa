#include <cuda_runtime.h>

#include "device.h"

namespace longshadow {
namespace {

// Stands for all kernels: they are compiled for the same architectures.
__global__ void any_kernel() {}

}  // namespace

std::string device_error(int device) {
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, any_kernel);
    cudaSetDevice(previous);
  }
  cudaGetLastError();  // the caller has been told; torch need not find it again
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace longshadow
