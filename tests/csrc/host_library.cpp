// The kernels' index logic on the CPU, by C functions that the tests call. Threads of a block take their
// turns in an order that `stride` chooses.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "fetch.h"
#include "plan.h"
#include "radix_select.h"
#include "segment_table.h"

namespace {

using namespace longshadow;

// Few threads, so that short rows take several rounds.
using Block = HostBlock<16>;

template <bool cached>
void choose(const float* scores, uint32_t num_scores, uint32_t count, int32_t* chosen, uint32_t capacity,
            uint32_t stride) {
  Block block(stride);
  SelectMemory memory;
  const ScoreRow row(scores, num_scores);
  std::vector<ScoreRow::Group> cache(cached ? row.num_groups() : 0);
  RowSelection<Block, cached>(block, memory, row, cache.data()).choose(count, chosen, capacity);
}

template <typename Values>
void fetch(const FetchProblem& problem, uint32_t num_places) {
  for (uint32_t index = 0; index < num_places; ++index) {
    Fetch fetches[1];
    find_fetches<Values::kScaled>(problem, {index}, num_places, fetches);
    const Fetch& fetched = fetches[0];
    if (fetched.source == nullptr) continue;
    for (uint32_t vector = 0; vector < problem.source_vectors; ++vector) {
      Values::store(problem.value_slots + fetched.token * problem.slot_vectors, vector,
                    load_once(fetched.source + vector), fetched.scale);
    }
    problem.has_values[fetched.token] = 1;
  }
}

}  // namespace

extern "C" {

void host_top_chunks(const float* scores, uint32_t num_scores, uint32_t count, int32_t* chosen,
                     uint32_t capacity, uint32_t cached, uint32_t stride) {
  (cached ? choose<true> : choose<false>)(scores, num_scores, count, chosen, capacity, stride);
}

uint32_t host_order_key(uint32_t bits) {
  return order_key(bits);
}

void host_plan_chunks(const int32_t* chosen, int32_t* slot_chunks, int32_t* last_used, uint8_t* has_values,
                      int32_t* slots, int32_t* misses, int32_t* num_misses, uint32_t num_chosen,
                      uint32_t num_slots, uint32_t chunk_size, int32_t step, uint32_t stride) {
  const PlanRow row{chosen,     slot_chunks, last_used, has_values, slots, misses,
                    num_misses, num_chosen,  num_slots, chunk_size, step};
  Block block(stride);
  std::vector<uint32_t> shared((plan_bytes(num_chosen, num_slots) + 3) / 4);
  uint32_t oldest = 0;
  RowPlan<Block>(block, row, shared.data(), &oldest).make();
}

uint32_t host_plan_bytes(uint32_t num_chosen, uint32_t num_slots) {
  return plan_bytes(num_chosen, num_slots);
}

uint32_t host_max_slots() {
  return RowPlan<Block>::kMaxSlots;
}

// `kind` of the values, and 2, 3 or 4 for slots of fp16, bf16 or fp32; V elements in a value.
void host_fetch_values(const int64_t* table, const int32_t* slot_chunks, const int32_t* places,
                       uint8_t* has_values, void* value_slots, uint32_t num_sequences, uint32_t num_segments,
                       uint32_t num_heads, uint32_t num_slots, uint32_t chunk_size, uint32_t num_places,
                       uint32_t head_dim, uint32_t kind, uint32_t slot_type) {
  const uint32_t slot_bytes = head_dim * (slot_type == 4 ? 4 : 2);
  const uint32_t source_bytes = kind == kRowInt8 ? head_dim : slot_bytes;
  const FetchProblem problem{table,
                             slot_chunks,
                             places,
                             has_values,
                             static_cast<Vector*>(value_slots),
                             num_segments,
                             num_heads,
                             num_slots,
                             chunk_size,
                             num_places,
                             static_cast<uint32_t>(source_bytes / sizeof(Vector)),
                             static_cast<uint32_t>(slot_bytes / sizeof(Vector))};
  const uint32_t of_all_rows = num_sequences * num_heads * num_places;
  if (kind == kRowModel) {
    fetch<ModelValues>(problem, of_all_rows);
  } else if (slot_type == 2) {
    fetch<Int8Values<c10::Half>>(problem, of_all_rows);
  } else if (slot_type == 3) {
    fetch<Int8Values<c10::BFloat16>>(problem, of_all_rows);
  } else {
    fetch<Int8Values<float>>(problem, of_all_rows);
  }
}

// Columns and kinds as C++ knows them, in the order of segment_table.h.
void host_table_layout(int32_t* layout) {
  const int32_t constants[] = {kNumFields,   kNumChunks, kFirstChunk, kValues,
                               kValueScales, kRowModel,  kRowInt8};
  for (const int32_t constant : constants) *layout++ = constant;
}

}  // extern "C"
