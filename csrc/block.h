// A block of threads as index logic sees it.
//
// The logic of a kernel is a template over a block: on a GPU `DeviceBlock`, and `HostBlock` when a C++
// compiler builds it for the CPU, where one thread takes all turns, in any order, so that tests run the very
// same code.
#pragma once

#include <array>
#include <cstdint>

#ifdef __CUDACC__
#define LONGSHADOW_INLINE __device__ __forceinline__
#define LONGSHADOW_CONSTEXPR __host__ __device__ constexpr
#define LONGSHADOW_UNROLL _Pragma("unroll")
#else
#define LONGSHADOW_INLINE inline
#define LONGSHADOW_CONSTEXPR constexpr
#define LONGSHADOW_UNROLL
#endif

namespace longshadow {

// Numbers that are added up together, element by element.
template <int size>
struct alignas(size % 4 == 0 ? 16 : 4) Counts {
  uint32_t of[size];
};

#ifdef __CUDACC__

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// `num_threads` is a multiple of the warp size, and scans are of `max_counts` numbers at most.
template <int num_threads, int max_counts>
class DeviceBlock {
 public:
  static constexpr int kNumThreads = num_threads;
  static constexpr int kNumWarps = num_threads / kWarpSize;
  static_assert(kNumWarps * kWarpSize == num_threads && kNumWarps <= kWarpSize);

  // What a thread remembers from one phase to the next.
  template <typename T>
  class PerThread {
   public:
    LONGSHADOW_INLINE T& operator[](int) { return value_; }

   private:
    T value_;
  };

  // The warps' totals of two scans: while one is read, the next can be written.
  using Scratch = uint32_t[2][max_counts][kNumWarps];

  LONGSHADOW_INLINE explicit DeviceBlock(Scratch& scratch) : scratch_(scratch) {}

  // One phase: every thread runs `run(thread)`, then all wait for each other.
  template <typename Run>
  LONGSHADOW_INLINE void each(Run run) const {
    run(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  // Puts the sum of the earlier threads' numbers into each thread's place, and returns the sum of all.
  template <int size>
  LONGSHADOW_INLINE Counts<size> scan(PerThread<Counts<size>>& values) {
    static_assert(size <= max_counts);
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    auto& totals = scratch_[parity_];
    parity_ ^= 1;
    Counts<size> before = values[0];
    inclusive_warp_scan(before, lane);
    if (lane == kWarpSize - 1) {
      for (int i = 0; i < size; ++i) totals[i][warp] = before.of[i];
    }
    __syncthreads();
    Counts<size> of_warps;
    LONGSHADOW_UNROLL
    for (int i = 0; i < size; ++i) of_warps.of[i] = lane < kNumWarps ? totals[i][lane] : 0;
    inclusive_warp_scan(of_warps, lane);
    Counts<size> sum;
    LONGSHADOW_UNROLL
    for (int i = 0; i < size; ++i) {
      const uint32_t of_earlier_warps = __shfl_sync(kWholeWarp, of_warps.of[i], warp > 0 ? warp - 1 : 0);
      values[0].of[i] = before.of[i] - values[0].of[i] + (warp > 0 ? of_earlier_warps : 0);
      sum.of[i] = __shfl_sync(kWholeWarp, of_warps.of[i], kWarpSize - 1);
    }
    return sum;
  }

  static LONGSHADOW_INLINE void add(uint32_t* to, uint32_t value) { atomicAdd(to, value); }

  // Lowers `*to` to the least of the threads' values; all threads of a warp call it.
  static LONGSHADOW_INLINE void lower(uint32_t* to, uint32_t value) {
    const uint32_t least = __reduce_min_sync(kWholeWarp, value);
    if (threadIdx.x % kWarpSize == 0) atomicMin(to, least);
  }

  // Stores `value` where `expected` stands; returns what stood there.
  static LONGSHADOW_INLINE uint16_t exchange_if(uint16_t* place, uint16_t expected, uint16_t value) {
    return atomicCAS(place, expected, value);
  }

 private:
  template <int size>
  static LONGSHADOW_INLINE void inclusive_warp_scan(Counts<size>& values, int lane) {
    LONGSHADOW_UNROLL
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      LONGSHADOW_UNROLL
      for (int i = 0; i < size; ++i) {
        const uint32_t earlier = __shfl_up_sync(kWholeWarp, values.of[i], distance);
        if (lane >= distance) values.of[i] += earlier;
      }
    }
  }

  Scratch& scratch_;
  int parity_ = 0;
};

#endif  // __CUDACC__

// Threads take their turns in the order 0, 1, 2 ... times `stride` modulo their number; `stride` is odd, and
// `num_threads` a power of two. Logic that is free of races gives the same for any order.
template <int num_threads>
class HostBlock {
 public:
  static constexpr int kNumThreads = num_threads;

  template <typename T>
  using PerThread = std::array<T, num_threads>;

  explicit HostBlock(uint32_t stride) : stride_(stride) {}

  template <typename Run>
  void each(Run run) const {
    for (uint32_t turn = 0; turn < num_threads; ++turn) run(static_cast<int>(turn * stride_ % num_threads));
  }

  template <int size>
  Counts<size> scan(PerThread<Counts<size>>& values) {
    Counts<size> sum{};
    for (Counts<size>& value : values) {
      for (int i = 0; i < size; ++i) {
        const uint32_t own = value.of[i];
        value.of[i] = sum.of[i];
        sum.of[i] += own;
      }
    }
    return sum;
  }

  static void add(uint32_t* to, uint32_t value) { *to += value; }

  static void lower(uint32_t* to, uint32_t value) {
    if (value < *to) *to = value;
  }

  static uint16_t exchange_if(uint16_t* place, uint16_t expected, uint16_t value) {
    const uint16_t found = *place;
    if (found == expected) *place = value;
    return found;
  }

 private:
  uint32_t stride_;
};

}  // namespace longshadow
