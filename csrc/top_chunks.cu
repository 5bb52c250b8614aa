// top_chunks: the largest scores of each row, in ascending order of their places; a block per row.
#include <algorithm>

#include "checks.h"
#include "radix_select.h"

namespace longshadow {
namespace {

using Block = DeviceBlock<512, 4>;

constexpr int64_t kMaxScores = 1 << 30;
constexpr int64_t kMaxCacheBytes =
    kMaxSharedBytes - sizeof(SelectMemory) - sizeof(Block::Scratch) - kAlignment;

// With `cached` the row's keys stay in shared memory after they were read once.
template <bool cached>
__global__ void __launch_bounds__(Block::kNumThreads, 2)
    top_chunks_kernel(const float* __restrict__ scores, const int32_t* __restrict__ counts,
                      int32_t* __restrict__ chosen, uint32_t num_heads, uint32_t num_scores,
                      uint32_t capacity) {
  extern __shared__ ScoreRow::Group cache[];
  __shared__ SelectMemory memory;
  __shared__ Block::Scratch scratch;
  const int64_t row = blockIdx.x;
  const int32_t asked = counts[blockIdx.x / num_heads];
  const uint32_t count = min(static_cast<uint32_t>(max(asked, 0)), capacity);
  Block block(scratch);
  RowSelection<Block, cached> selection(block, memory, ScoreRow(scores + row * num_scores, num_scores),
                                        cache);
  selection.choose(count, chosen + row * capacity, capacity);
}

void top_chunks(Tensor scores, Tensor counts, Tensor chosen) {
  const Arguments arguments("top_chunks", scores);
  const auto* from =
      arguments.pointer<float>(scores, "scores", ScalarType::Float, {kAnySize, kAnySize, kAnySize});
  const int64_t num_sequences = scores.size(0), num_heads = scores.size(1), num_scores = scores.size(2);
  const auto* how_many = arguments.pointer<int32_t>(counts, "counts", ScalarType::Int, {num_sequences});
  auto* to =
      arguments.pointer<int32_t>(chosen, "chosen", ScalarType::Int, {num_sequences, num_heads, kAnySize});
  const int64_t capacity = chosen.size(2), num_rows = num_sequences * num_heads;
  arguments.check(num_scores <= kMaxScores, "a row has at most ", kMaxScores, " scores, not ", num_scores);
  if (num_rows == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(arguments.device());
  const cudaStream_t stream = current_stream(arguments.device());
  // A row that does not begin at a multiple of 16 bytes has a group more.
  const int64_t cache_bytes =
      static_cast<int64_t>(sizeof(ScoreRow::Group)) * ((num_scores + 2 * (kGroup - 1)) / kGroup);
  const auto launch = [&](auto* kernel, int64_t shared_bytes) {
    kernel<<<num_rows, Block::kNumThreads, shared_bytes, stream>>>(from, how_many, to, num_heads, num_scores,
                                                                   capacity);
  };
  if (cache_bytes <= kMaxCacheBytes) {
    allow_shared_bytes(top_chunks_kernel<true>, kMaxCacheBytes);
    launch(top_chunks_kernel<true>, cache_bytes);
  } else {
    launch(top_chunks_kernel<false>, 0);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace longshadow

STABLE_TORCH_LIBRARY_IMPL(longshadow, CUDA, m) {
  m.impl("top_chunks_cuda", TORCH_BOX(&longshadow::top_chunks));
}
