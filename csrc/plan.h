// Which slot each chosen chunk of a row goes to, and which chunks have to be brought.
//
// The chosen chunks go into a hash table, where the slots look for the chunk they hold. Chunks that no slot
// holds are missing; they get, in their order, the slots that were used longest ago among those whose chunk
// is not chosen.
#pragma once

#include "block.h"

namespace longshadow {

constexpr uint16_t kNone = 0xffff;  // no place among the chosen chunks, or no slot

// One row's arrays; M chosen chunks, S slots, c tokens in a chunk.
struct PlanRow {
  const int32_t* chosen;  // [M], distinct; negative = none
  int32_t* slot_chunks;   // [S]
  int32_t* last_used;     // [S]
  uint8_t* has_values;    // [S, c]
  int32_t* slots;         // [M]
  int32_t* misses;        // [M]
  int32_t* num_misses;    // [1]
  uint32_t num_chosen, num_slots, chunk_size;
  int32_t step;
};

LONGSHADOW_CONSTEXPR uint32_t power_of_two_from(uint32_t number) {
  uint32_t power = 1;
  while (power < number) power *= 2;
  return power;
}

LONGSHADOW_CONSTEXPR uint32_t table_capacity(uint32_t num_chosen) {
  return 2 * power_of_two_from(num_chosen);
}

// Bytes of shared memory: first the table and the slots that are found, then, in their place, when slots were
// used.
LONGSHADOW_CONSTEXPR uint32_t plan_bytes(uint32_t num_chosen, uint32_t num_slots) {
  constexpr uint32_t kInt32 = 4, kInt16 = 2;
  const uint32_t matching = kInt16 * (table_capacity(num_chosen) + num_chosen);
  const uint32_t assigning = kInt32 * num_slots;
  return matching > assigning ? matching : assigning;
}

// Finds a chunk's place among the chosen ones. Open addressing, at most half full; a cell holds a place.
class ChunkTable {
 public:
  LONGSHADOW_INLINE ChunkTable(const int32_t* chosen, uint16_t* cells, uint32_t capacity)
      : chosen_(chosen), cells_(cells), mask_(capacity - 1) {}

  template <typename Block>
  LONGSHADOW_INLINE void insert(uint32_t place) {
    const int32_t chunk = chosen_[place];
    for (uint32_t cell = first_cell(chunk);; cell = (cell + 1) & mask_) {
      const uint16_t found = Block::exchange_if(&cells_[cell], kNone, static_cast<uint16_t>(place));
      if (found == kNone || chosen_[found] == chunk) return;
    }
  }

  // `kNone` where the chunk is not in the table.
  LONGSHADOW_INLINE uint16_t find(int32_t chunk) const {
    uint32_t cell = first_cell(chunk);
    while (cells_[cell] != kNone && chosen_[cells_[cell]] != chunk) cell = (cell + 1) & mask_;
    return cells_[cell];
  }

 private:
  LONGSHADOW_INLINE uint32_t first_cell(int32_t chunk) const {
    const uint32_t mixed = static_cast<uint32_t>(chunk) * 0x9e3779b1u;
    return (mixed ^ mixed >> 15) & mask_;
  }

  const int32_t* chosen_;
  uint16_t* cells_;
  uint32_t mask_;
};

// One row's plan; all threads of the block call `make`. `shared` has `plan_bytes` bytes, aligned to 4, and
// `oldest` is in shared memory, too. A thread remembers in 32 bits which of its slots stay, so there are at
// most 32 slots a thread.
template <typename Block>
class RowPlan {
 public:
  static constexpr uint32_t kNumThreads = Block::kNumThreads;
  static constexpr uint32_t kMaxSlots = 32 * kNumThreads;
  using Bits = typename Block::template PerThread<uint32_t>;
  using Numbers = typename Block::template PerThread<Counts<1>>;

  LONGSHADOW_INLINE RowPlan(Block& block, const PlanRow& row, void* shared, uint32_t* oldest)
      : block_(block), row_(row), shared_(shared), found_(static_cast<uint16_t*>(shared)), oldest_(oldest) {}

  LONGSHADOW_INLINE void make() {
    Bits kept;
    match(kept);
    const uint32_t num_misses = list_misses();
    if (num_misses > 0) assign(kept, num_misses);
  }

 private:
  // Finds the slots whose chunk is chosen; bit i of `kept` says so of a thread's i-th slot.
  LONGSHADOW_INLINE void match(Bits& kept) {
    const uint32_t capacity = table_capacity(row_.num_chosen);
    uint16_t* cells = found_ + row_.num_chosen;
    ChunkTable table(row_.chosen, cells, capacity);
    block_.each([&](int thread) {
      for (uint32_t i = thread; i < capacity; i += kNumThreads) cells[i] = kNone;
      for (uint32_t i = thread; i < row_.num_chosen; i += kNumThreads) found_[i] = kNone;
    });
    block_.each([&](int thread) {
      for (uint32_t place = thread; place < row_.num_chosen; place += kNumThreads) {
        if (row_.chosen[place] >= 0) table.template insert<Block>(place);
      }
    });
    block_.each([&](int thread) {
      kept[thread] = 0;
      uint32_t bit = 1;
      for (uint32_t slot = thread; slot < row_.num_slots; slot += kNumThreads, bit <<= 1) {
        const int32_t chunk = row_.slot_chunks[slot];
        const uint16_t place = chunk >= 0 ? table.find(chunk) : kNone;
        if (place == kNone) continue;
        found_[place] = static_cast<uint16_t>(slot);
        row_.last_used[slot] = row_.step;
        kept[thread] |= bit;
      }
    });
  }

  // Writes the slots of chunks that have one, and the places of those that have none, in order; returns how
  // many.
  LONGSHADOW_INLINE uint32_t list_misses() {
    const auto is_missing = [&](uint32_t place) {
      return place < row_.num_chosen && row_.chosen[place] >= 0 && found_[place] == kNone;
    };
    uint32_t num_misses = 0;
    Numbers before;
    for (uint32_t start = 0; start < row_.num_chosen; start += kNumThreads) {
      block_.each([&](int thread) { before[thread] = {is_missing(start + thread)}; });
      const uint32_t of_round = block_.scan(before).of[0];
      block_.each([&](int thread) {
        const uint32_t place = start + thread;
        if (place < row_.num_chosen) row_.slots[place] = found_[place] == kNone ? -1 : found_[place];
        if (is_missing(place)) row_.misses[num_misses + before[thread].of[0]] = static_cast<int32_t>(place);
      });
      num_misses += of_round;
    }
    block_.each([&](int thread) {
      for (uint32_t i = num_misses + thread; i < row_.num_chosen; i += kNumThreads) row_.misses[i] = -1;
      if (thread == 0) *row_.num_misses = static_cast<int32_t>(num_misses);
    });
    return num_misses;
  }

  // Gives the missing chunks their slots, the longest unused first.
  LONGSHADOW_INLINE void assign(Bits& kept, uint32_t num_misses) {
    constexpr uint32_t kStays = ~0u;
    uint32_t* uses = static_cast<uint32_t*>(shared_);
    block_.each([&](int thread) {
      uint32_t bits = kept[thread];
      for (uint32_t slot = thread; slot < row_.num_slots; slot += kNumThreads, bits >>= 1) {
        uses[slot] = bits & 1 ? kStays : order_bits(row_.last_used[slot]);
      }
    });
    // Neighbouring slots are one thread's, so that a scan over threads goes through them in order.
    const uint32_t per_thread = (row_.num_slots + kNumThreads - 1) / kNumThreads;
    const auto each_slot = [&](int thread, const auto& run) {
      const uint32_t start = thread * per_thread;
      for (uint32_t slot = start; slot < start + per_thread && slot < row_.num_slots; ++slot) run(slot);
    };
    Numbers before;
    uint32_t num_assigned = 0;
    for (uint32_t from = 0; num_assigned < num_misses;) {
      block_.each([&](int thread) {
        if (thread == 0) *oldest_ = kStays;
      });
      block_.each([&](int thread) {
        uint32_t oldest = kStays;
        each_slot(thread, [&](uint32_t slot) {
          if (uses[slot] >= from && uses[slot] < oldest) oldest = uses[slot];
        });
        Block::lower(oldest_, oldest);
      });
      const uint32_t oldest = *oldest_;
      if (oldest == kStays) return;
      block_.each([&](int thread) {
        before[thread] = {};
        each_slot(thread, [&](uint32_t slot) { before[thread].of[0] += uses[slot] == oldest; });
      });
      const uint32_t of_round = block_.scan(before).of[0];
      block_.each([&](int thread) {
        uint32_t i = num_assigned + before[thread].of[0];
        each_slot(thread, [&](uint32_t slot) {
          if (uses[slot] == oldest && i < num_misses) give(slot, row_.misses[i++]);
        });
      });
      num_assigned += of_round;
      from = oldest + 1;
    }
  }

  // Gives the slot to the chunk at a place among the chosen ones.
  LONGSHADOW_INLINE void give(uint32_t slot, int32_t place) const {
    row_.slots[place] = static_cast<int32_t>(slot);
    row_.slot_chunks[slot] = row_.chosen[place];
    row_.last_used[slot] = row_.step;
    uint8_t* flags = row_.has_values + slot * row_.chunk_size;
    for (uint32_t i = 0; i < row_.chunk_size; ++i) flags[i] = 0;
  }

  // Orders like the signed number.
  static LONGSHADOW_INLINE uint32_t order_bits(int32_t number) {
    return static_cast<uint32_t>(number) ^ 0x80000000u;
  }

  Block& block_;
  PlanRow row_;
  void* shared_;
  uint16_t* found_;  // [M]: the slot of each chosen chunk, or none; until slots are assigned
  uint32_t* oldest_;
};

}  // namespace longshadow
