// What index logic takes from CUDA, on the threads of a CPU: one thread each, which meet where a GPU's would.
//
// A data race in the logic is a data race of C++ here, and ThreadSanitizer finds it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __CUDACC__
#define __device__
#define __host__
#define __forceinline__ inline

struct uint4 {
  uint32_t x, y, z, w;
};

struct Index {
  unsigned x;
};

inline thread_local Index threadIdx;

namespace cuda_on_threads {

constexpr int kWarp = 32;

// A barrier. That of the standard library synchronises with other barriers, too, which would hide races.
class Meeting {
 public:
  explicit Meeting(int num_threads) : num_threads_(num_threads) {}

  void arrive_and_wait() {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      num_arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
    }
  }

 private:
  const int num_threads_;
  std::atomic<int> num_arrived_ = 0, phase_ = 0;
};

struct Warp {
  Meeting meeting{kWarp};
  int64_t values[kWarp];
};

struct ThreadBlock {
  explicit ThreadBlock(int num_threads) : meeting(num_threads) {
    for (int i = 0; i < num_threads / kWarp; ++i) warps.push_back(std::make_unique<Warp>());
  }

  Meeting meeting;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline ThreadBlock* running;

// Runs `kernel` on all threads of a block.
template <typename Kernel>
void launch(int num_threads, Kernel kernel) {
  ThreadBlock block(num_threads);
  running = &block;
  std::vector<std::jthread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&kernel, i] {
      threadIdx.x = i;
      kernel();
    });
  }
}

// All lanes of a warp hand in a value; `take(values, lane)` is what this one gets.
template <typename T, typename Take>
T exchange(T value, Take take) {
  Warp& warp = *running->warps[threadIdx.x / kWarp];
  const int lane = threadIdx.x % kWarp;
  warp.values[lane] = value;
  warp.meeting.arrive_and_wait();
  const T taken = static_cast<T>(take(warp.values, lane));
  warp.meeting.arrive_and_wait();
  return taken;
}

}  // namespace cuda_on_threads

inline void __syncthreads() {
  cuda_on_threads::running->meeting.arrive_and_wait();
}

inline void __syncwarp() {
  cuda_on_threads::running->warps[threadIdx.x / cuda_on_threads::kWarp]->meeting.arrive_and_wait();
}

inline uint32_t __shfl_sync(unsigned, uint32_t value, int from) {
  return cuda_on_threads::exchange(value, [=](const int64_t* values, int) { return values[from]; });
}

inline uint32_t __shfl_up_sync(unsigned, uint32_t value, int distance) {
  return cuda_on_threads::exchange(value, [=](const int64_t* values, int lane) {
    return values[lane < distance ? lane : lane - distance];
  });
}

inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  return cuda_on_threads::exchange(value, [](const int64_t* values, int) {
    int64_t least = values[0];
    for (int i = 1; i < cuda_on_threads::kWarp; ++i) least = values[i] < least ? values[i] : least;
    return least;
  });
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

inline void atomicAdd(uint32_t* to, uint32_t value) {
  std::atomic_ref(*to).fetch_add(value);
}

inline void atomicMin(uint32_t* to, uint32_t value) {
  std::atomic_ref shared(*to);
  for (uint32_t found = shared; value < found && !shared.compare_exchange_weak(found, value);) {
  }
}

inline uint16_t atomicCAS(uint16_t* place, uint16_t expected, uint16_t value) {
  std::atomic_ref(*place).compare_exchange_strong(expected, value);
  return expected;
}
