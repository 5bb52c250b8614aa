// Where a token's value lies, and how it gets into its slot.
//
// A place is slot * c + offset. The slot's chunk lies in one of the sequence's segments, whose values [H,
// C_n, c, V] may be in host memory that the device reads directly. They move in vectors of 16 bytes.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

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
  const float* scale;
  int64_t token;  // among all rows' slots, [B, H, S, c]
};

// What one of the B * H * T places asks for.
LONGSHADOW_INLINE Fetch find_fetch(const FetchProblem& problem, uint32_t index) {
  const int32_t place = problem.places[index];
  if (place < 0) return {};
  const uint32_t row = index / problem.num_places;
  const int64_t slot = int64_t{row} * problem.num_slots + static_cast<uint32_t>(place) / problem.chunk_size;
  const uint32_t offset = static_cast<uint32_t>(place) % problem.chunk_size;
  const int64_t token = slot * problem.chunk_size + offset;
  const int64_t chunk = problem.slot_chunks[slot];
  if (chunk < 0 || problem.has_values[token]) return {};
  const uint32_t sequence = row / problem.num_heads, head = row % problem.num_heads;
  const int64_t* segment = problem.table + int64_t{sequence} * problem.num_segments * kNumFields;
  for (uint32_t i = 0; i < problem.num_segments; ++i, segment += kNumFields) {
    const int64_t num_chunks = segment[kNumChunks];
    const int64_t local = chunk - segment[kFirstChunk];
    if (local < 0 || local >= num_chunks) continue;
    const int64_t source = (head * num_chunks + local) * problem.chunk_size + offset;
    const int64_t value = segment[kValues] + source * problem.source_vectors * int64_t{sizeof(Vector)};
    const int64_t scale = segment[kValueScales] + source * int64_t{sizeof(float)};
    return {reinterpret_cast<const Vector*>(value), reinterpret_cast<const float*>(scale), token};
  }
  return {};
}

// Fetched values are not read again by the program that fetches them: they need no place in its cache.
LONGSHADOW_INLINE Vector load_once(const Vector* from) {
  Vector loaded;
#ifdef __CUDACC__
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

}  // namespace longshadow
