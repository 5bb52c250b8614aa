// Where a token's value lies, and how it gets into its slot.
//
// A place is slot * c + offset. The slot's chunk lies in one of the sequence's segments, whose values [H,
// C_n, c, V] may be in host memory that the device reads directly. They move in vectors of 16 bytes.
#pragma once

#include <cstring>

#include "block.h"
#include "segment_table.h"

namespace longshadow {

struct alignas(16) Vector {
  uint32_t words[4];
};

// B sequences of N segments at most, H heads, S slots of c tokens, T places; a row is a head of a sequence.
struct FetchProblem {
  const int64_t* table;        // [B, N, kNumFields]
  const int32_t* slot_chunks;  // [B, H, S]
  const int32_t* places;       // [B, H, T]; -1 = none
  uint8_t* has_values;         // [B, H, S, c]
  Vector* value_slots;         // [B, H, S, c, slot_vectors]
  uint32_t num_segments, num_heads, num_slots, chunk_size, num_places;
  uint32_t source_vectors, slot_vectors;  // of a token's value, in its segment and in its slot
};

// A token's value that has to be fetched; nothing where `source` is null.
struct Fetch {
  const Vector* source;
  float scale;
  uint32_t token;  // among all rows' slots, [B, H, S, c]
};

// What some of the `num_places` places of all rows ask for, nothing where an index is beyond them. The loads
// of each stage do not depend on each other, so that they are under way at once.
template <bool scaled, int count>
LONGSHADOW_INLINE void find_fetches(const FetchProblem& problem, const uint32_t (&indices)[count],
                                    uint32_t num_places, Fetch (&fetches)[count]) {
  int32_t places[count];
  LONGSHADOW_UNROLL
  for (int i = 0; i < count; ++i) places[i] = indices[i] < num_places ? problem.places[indices[i]] : -1;
  int32_t chunks[count];
  LONGSHADOW_UNROLL
  for (int i = 0; i < count; ++i) {
    fetches[i] = {nullptr, 1.0f, 0};
    chunks[i] = -1;
    if (places[i] < 0) continue;
    const uint32_t row = indices[i] / problem.num_places;
    fetches[i].token = row * problem.num_slots * problem.chunk_size + places[i];
    const int32_t chunk = problem.slot_chunks[fetches[i].token / problem.chunk_size];
    chunks[i] = problem.has_values[fetches[i].token] ? -1 : chunk;
  }
  for (uint32_t segment = 0; segment < problem.num_segments; ++segment) {
    LONGSHADOW_UNROLL
    for (int i = 0; i < count; ++i) {
      if (chunks[i] < 0) continue;
      const uint32_t row = indices[i] / problem.num_places;
      const uint32_t sequence = row / problem.num_heads, head = row % problem.num_heads;
      const int64_t* fields = problem.table + int64_t{sequence * problem.num_segments + segment} * kNumFields;
      const auto num_chunks = static_cast<int32_t>(fields[kNumChunks]);
      const int32_t local = chunks[i] - static_cast<int32_t>(fields[kFirstChunk]);
      if (local < 0 || local >= num_chunks) continue;
      const int64_t chunk = int64_t{head} * num_chunks + local;
      const int64_t token = chunk * problem.chunk_size + fetches[i].token % problem.chunk_size;
      fetches[i].source = reinterpret_cast<const Vector*>(fields[kValues]) + token * problem.source_vectors;
      if constexpr (scaled) fetches[i].scale = reinterpret_cast<const float*>(fields[kValueScales])[token];
      chunks[i] = -1;
    }
  }
}

// Fetched values are not read again by the program that fetches them: they need no place in its cache.
LONGSHADOW_INLINE Vector load_once(const Vector* from) {
  Vector loaded;
#ifdef __CUDA_ARCH__
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.words[0]), "=r"(loaded.words[1]), "=r"(loaded.words[2]), "=r"(loaded.words[3])
               : "l"(from));
#else
  loaded = *from;
#endif
  return loaded;
}

// Values in the model's dtype: vectors are copied as they are.
struct ModelValues {
  static constexpr bool kScaled = false;

  static LONGSHADOW_INLINE void store(Vector* value, uint32_t index, const Vector& loaded, float) {
    value[index] = loaded;
  }
};

// Values in int8: a vector of 16 becomes 16 `Scalar`s, element * scale, rounded once.
template <typename Scalar>
struct Int8Values {
  static constexpr bool kScaled = true;

  static LONGSHADOW_INLINE void store(Vector* value, uint32_t index, const Vector& loaded, float scale) {
    constexpr uint32_t kVectors = sizeof(Scalar);
    constexpr uint32_t kPerWord = sizeof(uint32_t) / sizeof(Scalar);
    LONGSHADOW_UNROLL
    for (uint32_t i = 0; i < kVectors; ++i) {
      Vector scaled;
      LONGSHADOW_UNROLL
      for (uint32_t word = 0; word < 4; ++word) {
        Scalar elements[kPerWord];
        LONGSHADOW_UNROLL
        for (uint32_t j = 0; j < kPerWord; ++j) {
          const uint32_t from = (4 * i + word) * kPerWord + j;
          const auto element = static_cast<int8_t>(loaded.words[from / 4] >> 8 * (from % 4));
          elements[j] = static_cast<Scalar>(static_cast<float>(element) * scale);
        }
        std::memcpy(&scaled.words[word], elements, sizeof(uint32_t));
      }
      value[index * kVectors + i] = scaled;
    }
  }
};

#ifdef __CUDACC__

// Values that a thread moves at once: a load from the host takes more than a microsecond.
constexpr int kFetchesAtOnce = 4;

// One warp's share of `num_places` places among `num_warps`. 2^lane_bits neighbouring threads, up to a warp,
// move a value together.
template <typename Values>
LONGSHADOW_INLINE void fetch_by_warp(const FetchProblem& problem, uint32_t num_places, uint32_t lane_bits,
                                     uint32_t warp, uint32_t num_warps) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t first_vector = lane & ((1u << lane_bits) - 1);
  const uint32_t side_by_side = kWarpSize >> lane_bits;
  const uint32_t of_warp = side_by_side * kFetchesAtOnce;
  for (uint32_t start = warp * of_warp; start < num_places; start += num_warps * of_warp) {
    uint32_t indices[kFetchesAtOnce];
    LONGSHADOW_UNROLL
    for (int i = 0; i < kFetchesAtOnce; ++i) indices[i] = start + i * side_by_side + (lane >> lane_bits);
    Fetch fetches[kFetchesAtOnce];
    find_fetches<Values::kScaled>(problem, indices, num_places, fetches);
    for (uint32_t vector = first_vector; vector < problem.source_vectors; vector += 1u << lane_bits) {
      Vector loaded[kFetchesAtOnce];
      LONGSHADOW_UNROLL
      for (int i = 0; i < kFetchesAtOnce; ++i) {
        if (fetches[i].source != nullptr) loaded[i] = load_once(fetches[i].source + vector);
      }
      LONGSHADOW_UNROLL
      for (int i = 0; i < kFetchesAtOnce; ++i) {
        if (fetches[i].source == nullptr) continue;
        Values::store(problem.value_slots + int64_t{fetches[i].token} * problem.slot_vectors, vector,
                      loaded[i], fetches[i].scale);
      }
    }
    // Not before all threads of a value have seen that it is missing.
    __syncwarp();
    LONGSHADOW_UNROLL
    for (int i = 0; i < kFetchesAtOnce; ++i) {
      if (first_vector == 0 && fetches[i].source != nullptr) problem.has_values[fetches[i].token] = 1;
    }
  }
}

#endif  // __CUDACC__

}  // namespace longshadow
