// fetch_values: tokens' values from their segments, also straight from pinned host memory, into their slots.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "checks.h"
#include "fetch.h"

namespace longshadow {
namespace {

constexpr uint32_t kThreads = 256;
// Half of the threads that a multiprocessor holds are enough to keep memory busy; the others are left to the
// kernels that run meanwhile on another stream.
constexpr int64_t kBlocksPerMultiprocessor = 4;

template <typename Values>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    fetch_values_kernel(FetchProblem problem, uint32_t num_places, uint32_t lane_bits) {
  constexpr uint32_t kWarps = kThreads / kWarpSize;
  const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  fetch_by_warp<Values>(problem, num_places, lane_bits, warp, gridDim.x * kWarps);
}

using Kernel = void(FetchProblem, uint32_t, uint32_t);

// The kernel for values of `kind` and slots of `dtype`; null where there is none.
Kernel* choose_kernel(int64_t kind, ScalarType dtype) {
  const bool is_float =
      dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float;
  if (kind == kRowModel) return is_float ? fetch_values_kernel<ModelValues> : nullptr;
  if (kind != kRowInt8) return nullptr;
  switch (dtype) {
    case ScalarType::Half:
      return fetch_values_kernel<Int8Values<c10::Half>>;
    case ScalarType::BFloat16:
      return fetch_values_kernel<Int8Values<c10::BFloat16>>;
    case ScalarType::Float:
      return fetch_values_kernel<Int8Values<float>>;
    default:
      return nullptr;
  }
}

void fetch_values(Tensor table, Tensor slot_chunks, Tensor places, int64_t kind, Tensor has_values,
                  Tensor value_slots) {
  const Arguments arguments("fetch_values", table);
  constexpr ScalarType kInt = ScalarType::Int;
  FetchProblem problem{};
  problem.table =
      arguments.pointer<int64_t>(table, "table", ScalarType::Long, {kAnySize, kAnySize, kNumFields});
  const int64_t num_sequences = table.size(0);
  problem.slot_chunks =
      arguments.pointer<int32_t>(slot_chunks, "slot_chunks", kInt, {num_sequences, kAnySize, kAnySize});
  const int64_t num_heads = slot_chunks.size(1), num_slots = slot_chunks.size(2);
  problem.places = arguments.pointer<int32_t>(places, "places", kInt, {num_sequences, num_heads, kAnySize});
  problem.has_values = arguments.pointer<uint8_t>(has_values, "has_values", ScalarType::Byte,
                                                  {num_sequences, num_heads, num_slots, kAnySize});
  const int64_t chunk_size = has_values.size(3);
  problem.value_slots = static_cast<Vector*>(arguments.vector_pointer(
      value_slots, "value_slots", {num_sequences, num_heads, num_slots, chunk_size, kAnySize}));
  const int64_t head_dim = value_slots.size(4),
                slot_bytes = head_dim * static_cast<int64_t>(value_slots.element_size());
  const int64_t source_bytes = kind == kRowInt8 ? head_dim : slot_bytes;
  Kernel* const kernel = choose_kernel(kind, value_slots.scalar_type());
  arguments.check(kernel != nullptr, "values must be of kind ", kRowModel, " (the model's dtype) or ",
                  kRowInt8, " (int8) and value_slots Half, BFloat16 or Float, not ", kind, " and ",
                  torch::headeronly::toString(value_slots.scalar_type()));
  constexpr int64_t kVectorBytes = sizeof(Vector);
  arguments.check(source_bytes % kVectorBytes == 0, "values of ", source_bytes,
                  " bytes cannot be read 16 bytes at a time");
  problem.num_segments = table.size(1);
  problem.num_heads = num_heads;
  problem.num_slots = num_slots;
  problem.chunk_size = chunk_size;
  problem.num_places = places.size(2);
  problem.source_vectors = source_bytes / kVectorBytes;
  problem.slot_vectors = slot_bytes / kVectorBytes;
  const int64_t num_places = places.numel(), num_tokens = has_values.numel();
  arguments.check(std::max(num_places, num_tokens) <= INT32_MAX, "there are at most ", INT32_MAX,
                  " places and tokens of slots, not ", num_places, " and ", num_tokens);
  if (num_places == 0 || head_dim == 0) return;

  // The fewest threads that have one for each vector of a value.
  uint32_t lane_bits = 0;
  while (lane_bits < 5 && 1u << lane_bits < problem.source_vectors) ++lane_bits;
  const int64_t per_block = kThreads * kFetchesAtOnce >> lane_bits;
  const torch::stable::accelerator::DeviceGuard guard(arguments.device());
  int num_multiprocessors = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, arguments.device()));
  const int64_t num_blocks =
      std::min((num_places + per_block - 1) / per_block, kBlocksPerMultiprocessor * num_multiprocessors);
  kernel<<<num_blocks, kThreads, 0, current_stream(arguments.device())>>>(problem, num_places, lane_bits);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace longshadow

STABLE_TORCH_LIBRARY_IMPL(longshadow, CUDA, m) {
  m.impl("fetch_values_cuda", TORCH_BOX(&longshadow::fetch_values));
}
