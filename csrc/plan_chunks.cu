// plan_chunks: a slot for each chosen chunk, and the chunks that have to be brought; a block per row.
#include "checks.h"
#include "plan.h"

namespace longshadow {
namespace {

using Block = DeviceBlock<512, 1>;

constexpr int64_t kMaxPlanBytes = kMaxSharedBytes - sizeof(Block::Scratch) - sizeof(uint32_t) - kAlignment;

// `rows` describes the first row.
__global__ void __launch_bounds__(Block::kNumThreads, 2)
    plan_chunks_kernel(PlanRow rows, const int32_t* __restrict__ step) {
  extern __shared__ int32_t shared[];
  __shared__ Block::Scratch scratch;
  __shared__ uint32_t oldest;
  const int64_t first_chosen = int64_t{blockIdx.x} * rows.num_chosen,
                first_slot = int64_t{blockIdx.x} * rows.num_slots;
  PlanRow row = rows;
  row.chosen += first_chosen;
  row.slots += first_chosen;
  row.misses += first_chosen;
  row.slot_chunks += first_slot;
  row.last_used += first_slot;
  row.has_values += first_slot * rows.chunk_size;
  row.num_misses += blockIdx.x;
  row.step = *step;
  Block block(scratch);
  RowPlan<Block>(block, row, shared, &oldest).make();
}

void plan_chunks(Tensor chosen, Tensor slot_chunks, Tensor last_used, Tensor has_values, Tensor step,
                 Tensor slots, Tensor misses, Tensor num_misses) {
  const Arguments arguments("plan_chunks", chosen);
  constexpr ScalarType kInt = ScalarType::Int;
  PlanRow rows{};
  rows.chosen = arguments.pointer<int32_t>(chosen, "chosen", kInt, {kAnySize, kAnySize, kAnySize});
  const int64_t num_sequences = chosen.size(0), num_heads = chosen.size(1), num_chosen = chosen.size(2);
  rows.slot_chunks =
      arguments.pointer<int32_t>(slot_chunks, "slot_chunks", kInt, {num_sequences, num_heads, kAnySize});
  const int64_t num_slots = slot_chunks.size(2);
  rows.last_used =
      arguments.pointer<int32_t>(last_used, "last_used", kInt, {num_sequences, num_heads, num_slots});
  rows.has_values = arguments.pointer<uint8_t>(has_values, "has_values", ScalarType::Byte,
                                               {num_sequences, num_heads, num_slots, kAnySize});
  const auto* now = arguments.pointer<int32_t>(step, "step", kInt, {1});
  rows.slots = arguments.pointer<int32_t>(slots, "slots", kInt, {num_sequences, num_heads, num_chosen});
  rows.misses = arguments.pointer<int32_t>(misses, "misses", kInt, {num_sequences, num_heads, num_chosen});
  rows.num_misses = arguments.pointer<int32_t>(num_misses, "num_misses", kInt, {num_sequences, num_heads});
  rows.num_chosen = num_chosen;
  rows.num_slots = num_slots;
  rows.chunk_size = has_values.size(3);
  arguments.check(num_chosen <= num_slots, "there must be a slot for each of the ", num_chosen,
                  " chosen chunks, not ", num_slots);
  arguments.check(num_slots <= RowPlan<Block>::kMaxSlots, "a row has at most ", RowPlan<Block>::kMaxSlots,
                  " slots, not ", num_slots);
  const int64_t bytes = plan_bytes(rows.num_chosen, rows.num_slots);
  arguments.check(bytes <= kMaxPlanBytes, num_chosen, " chosen chunks and ", num_slots, " slots need ", bytes,
                  " bytes of shared memory, and there are ", kMaxPlanBytes);
  const int64_t num_rows = num_sequences * num_heads;
  if (num_rows == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(arguments.device());
  allow_shared_bytes(plan_chunks_kernel, kMaxPlanBytes);
  plan_chunks_kernel<<<num_rows, Block::kNumThreads, bytes, current_stream(arguments.device())>>>(rows, now);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace longshadow

STABLE_TORCH_LIBRARY_IMPL(longshadow, CUDA, m) {
  m.impl("plan_chunks_cuda", TORCH_BOX(&longshadow::plan_chunks));
}
