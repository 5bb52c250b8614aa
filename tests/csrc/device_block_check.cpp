// Runs the index logic on `DeviceBlock`, as on a GPU, and on `HostBlock`; exits with 1 where they differ.
// Built with ThreadSanitizer, which ends the program when threads race.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

#include "cuda_on_threads.h"
#include "fetch.h"
#include "plan.h"
#include "radix_select.h"

using namespace longshadow;

namespace {

using Device = DeviceBlock<64, 4>;
using Host = HostBlock<16>;

std::mt19937 random_number(7);

void require_equal(const std::vector<int32_t>& device, const std::vector<int32_t>& host, const char* what) {
  if (device == host) return;
  std::printf("%s differs\n", what);
  std::exit(1);
}

// One scan right after the other, which nothing but the scans themselves keeps apart.
void check_scans() {
  constexpr int kScans = 5, kCounts = 3;
  std::vector<int32_t> before(Device::kNumThreads * kScans * kCounts), expected(before.size());
  const auto number = [](int thread, int scan, int i) { return (thread * 7 + scan * 5 + i * 3) % 11; };
  for (int scan = 0; scan < kScans; ++scan) {
    for (int i = 0; i < kCounts; ++i) {
      int32_t sum = 0;
      for (int thread = 0; thread < Device::kNumThreads; ++thread) {
        expected[(thread * kScans + scan) * kCounts + i] = sum;
        sum += number(thread, scan, i);
      }
    }
  }
  Device::Scratch scratch;
  cuda_on_threads::launch(Device::kNumThreads, [&] {
    Device block(scratch);
    for (int scan = 0; scan < kScans; ++scan) {
      Device::PerThread<Counts<kCounts>> counts;
      for (int i = 0; i < kCounts; ++i) counts[0].of[i] = number(threadIdx.x, scan, i);
      block.scan(counts);
      for (int i = 0; i < kCounts; ++i) before[(threadIdx.x * kScans + scan) * kCounts + i] = counts[0].of[i];
    }
  });
  require_equal(before, expected, "scan");
}

template <bool cached>
void check_selection(const std::vector<float>& scores, uint32_t count, uint32_t capacity) {
  const ScoreRow row(scores.data() + 1, scores.size() - 1);
  std::vector<ScoreRow::Group> cache(row.num_groups());
  std::vector<int32_t> by_host(capacity, -7), by_device(capacity, -7);
  SelectMemory memory;
  Host host(1);
  RowSelection<Host, cached>(host, memory, row, cache.data()).choose(count, by_host.data(), capacity);
  Device::Scratch scratch;
  cuda_on_threads::launch(Device::kNumThreads, [&] {
    Device block(scratch);
    RowSelection<Device, cached>(block, memory, row, cache.data()).choose(count, by_device.data(), capacity);
  });
  require_equal(by_device, by_host, "selection");
}

// The arrays of a plan, in one vector, so that they are compared at once.
struct Plan {
  uint32_t num_chosen, num_slots, chunk_size;
  std::vector<int32_t> numbers;
  std::vector<uint8_t> flags;

  PlanRow row(const std::vector<int32_t>& chosen, int32_t step) {
    int32_t* at = numbers.data();
    return {chosen.data(),
            at,
            at + num_slots,
            flags.data(),
            at + 2 * num_slots,
            at + 2 * num_slots + num_chosen,
            at + 2 * (num_slots + num_chosen),
            num_chosen,
            num_slots,
            chunk_size,
            step};
  }
};

void check_plans(uint32_t num_chosen, uint32_t num_slots, uint32_t num_chunks, int num_steps) {
  Plan by_host{num_chosen, num_slots, 3, std::vector<int32_t>(2 * (num_slots + num_chosen) + 1, 0),
               std::vector<uint8_t>(3 * num_slots, 1)};
  std::fill_n(by_host.numbers.begin(), num_slots, -1);
  Plan by_device = by_host;
  std::vector<uint32_t> shared(plan_bytes(num_chosen, num_slots) / 4 + 1);
  uint32_t oldest;
  std::vector<int32_t> chunks(num_chunks);
  std::iota(chunks.begin(), chunks.end(), 0);
  for (int step = 1; step <= num_steps; ++step) {
    std::shuffle(chunks.begin(), chunks.end(), random_number);
    std::vector<int32_t> chosen(chunks.begin(), chunks.begin() + num_chosen);
    chosen[step % num_chosen] = -1;
    Host host(5);
    RowPlan<Host>(host, by_host.row(chosen, step), shared.data(), &oldest).make();
    Device::Scratch scratch;
    const PlanRow row = by_device.row(chosen, step);
    cuda_on_threads::launch(Device::kNumThreads, [&] {
      Device block(scratch);
      RowPlan<Device>(block, row, shared.data(), &oldest).make();
    });
    require_equal(by_device.numbers, by_host.numbers, "plan");
    require_equal({by_device.flags.begin(), by_device.flags.end()},
                  {by_host.flags.begin(), by_host.flags.end()}, "has_values");
  }
}

// Values of `source_vectors` vectors, two segments of three and five chunks, every third value already there.
template <typename Values>
void check_fetches(uint32_t source_vectors, uint32_t slot_vectors, uint32_t lane_bits) {
  constexpr uint32_t kHeads = 2, kSlots = 7, kTokens = 3, kRows = kHeads, kPlaces = kSlots * kTokens;
  const int64_t lengths[] = {3, 5};
  std::vector<Vector> values[2];
  std::vector<float> scales[2];
  std::vector<int64_t> table(2 * kNumFields);
  for (int segment = 0; segment < 2; ++segment) {
    const size_t num_values = kHeads * lengths[segment] * kTokens;
    values[segment].resize(num_values * source_vectors);
    for (Vector& value : values[segment]) {
      for (uint32_t& word : value.words) word = random_number();
    }
    for (size_t i = 0; i < num_values; ++i) scales[segment].push_back(0.01f * (i + 1));
    int64_t* row = table.data() + segment * kNumFields;
    row[kNumChunks] = lengths[segment];
    row[kFirstChunk] = segment * lengths[0];
    row[kValues] = reinterpret_cast<int64_t>(values[segment].data());
    row[kValueScales] = reinterpret_cast<int64_t>(scales[segment].data());
  }
  std::vector<int32_t> slot_chunks = {7, -1, 0, 3, 2, 4, 1, 5, 6, 7, 0, 1, 2, -1};
  std::vector<int32_t> places(kRows * kPlaces);
  for (uint32_t i = 0; i < places.size(); ++i)
    places[i] = i % 4 == 1 ? -1 : static_cast<int32_t>(kPlaces - 1 - i % kPlaces);
  std::vector<Vector> by_host(kRows * kPlaces * slot_vectors), by_device = by_host;
  std::vector<uint8_t> host_flags(kRows * kPlaces);
  for (uint32_t i = 0; i < host_flags.size(); ++i) host_flags[i] = i % 3 == 0;
  std::vector<uint8_t> device_flags = host_flags;
  FetchProblem problem{table.data(),   slot_chunks.data(),
                       places.data(),  host_flags.data(),
                       by_host.data(), 2,
                       kHeads,         kSlots,
                       kTokens,        kPlaces,
                       source_vectors, slot_vectors};
  for (uint32_t index = 0; index < places.size(); ++index) {
    Fetch fetches[1];
    find_fetches<Values::kScaled>(problem, {index}, places.size(), fetches);
    const Fetch& fetch = fetches[0];
    if (fetch.source == nullptr) continue;
    for (uint32_t vector = 0; vector < source_vectors; ++vector) {
      Values::store(by_host.data() + fetch.token * slot_vectors, vector, fetch.source[vector], fetch.scale);
    }
    host_flags[fetch.token] = 1;
  }
  problem.has_values = device_flags.data();
  problem.value_slots = by_device.data();
  cuda_on_threads::launch(Device::kNumThreads, [&] {
    fetch_by_warp<Values>(problem, places.size(), lane_bits, threadIdx.x / kWarpSize, Device::kNumWarps);
  });
  const auto words = [](const std::vector<Vector>& vectors) {
    std::vector<int32_t> joined;
    for (const Vector& vector : vectors) joined.insert(joined.end(), vector.words, vector.words + 4);
    return joined;
  };
  require_equal(words(by_device), words(by_host), "values");
  require_equal({device_flags.begin(), device_flags.end()}, {host_flags.begin(), host_flags.end()},
                "has_values");
}

}  // namespace

int main() {
  check_scans();
  std::normal_distribution<float> logits(0.0f, 3.0f);
  std::vector<float> weights(1200);
  for (float& weight : weights) weight = std::exp(logits(random_number));
  check_selection<true>(weights, 211, 230);
  std::fill(weights.begin() + 300, weights.end(), 0.125f);
  check_selection<false>(weights, 500, 500);
  check_plans(40, 70, 90, 3);
  check_fetches<ModelValues>(5, 5, 3);
  check_fetches<ModelValues>(40, 40, 5);
  check_fetches<Int8Values<float>>(2, 8, 1);
  return 0;
}
