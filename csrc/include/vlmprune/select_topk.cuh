// Position-sorted top-k of each row, exact and deterministic (specification: vlmprune/ops/reference.py).
//
// Every position gets an integer key whose order is the selection order; below the threshold it counts as
// dropped. Three radix rounds of 11 bits find the key of the last position kept, unless all are; one prefix
// sum then gives each kept position its slot.
// Latency bound: the row is read once, the rest is eleven barriers. No sort anywhere.
// Grid: (B), one block a row.
//
// Each warp walks its own contiguous stretch of the row, the same one in every pass. So a thread meets only
// keys it wrote itself (no barrier guards them), shared memory is read without bank conflicts, slots ascend.
// Integer atomics only: the result does not depend on the order in which threads run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "vlmprune/block_scan.cuh"

namespace vlmprune {

struct SelectTopkArgs {
  const float* scores;  // [B, N], rows scores_stride elements apart
  int64_t scores_stride;
  const int64_t* keep;  // [B], keep_stride elements apart; null: keep_all for every row
  int64_t keep_stride;
  int64_t keep_all;
  const int8_t* code;  // [B, N], rows code_stride elements apart; null: every position is prunable
  int64_t code_stride;
  const float* threshold;  // [B], threshold_stride elements apart; null: threshold_all for every row
  int64_t threshold_stride;
  float threshold_all;
  int has_threshold;  // 0: every prunable position competes
  int64_t* index;     // [B, width], contiguous, output
  int64_t* count;     // [B], output
  int B, N, width;
};

namespace select_topk {

constexpr int kThreads = 1024;
constexpr int kBins = 2048;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kRounds = 3;
constexpr size_t kSharedWithoutOptIn = 48 * 1024;

constexpr uint32_t kDropped = 0;           // below every key of a prunable position
constexpr uint32_t kNaN = 1;               // below -inf, whose key is 0x007FFFFF
constexpr uint32_t kZero = 0x80000000u;    // of 0.0 and -0.0
constexpr uint32_t kForced = 0xFFFFFFFFu;  // above +inf, whose key is 0xFF800000

struct Shared {
  uint64_t pair_sums[kThreads / kWarpSize];
  uint32_t warp_sums[kThreads / kWarpSize];
  uint32_t histogram[kBins];
  uint32_t digit, rank;
};

// Keep every key above `key`, and of those equal to it the first `ties` by position.
struct Threshold {
  uint32_t key, ties;
};

// Works on the bits alone, so flushing denormals to zero cannot change the order.
__device__ inline uint32_t order_key(float score) {
  const uint32_t bits = __float_as_uint(score), magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kNaN;
  if (magnitude == 0) return kZero;
  return bits == magnitude ? bits | 0x80000000u : ~bits;
}

// The lowest key that may compete. No score reaches a threshold that is NaN.
__device__ inline uint32_t floor_key(float threshold) {
  const uint32_t key = order_key(threshold);
  return key == kNaN ? kForced : key;
}

// Keys of one row of N scores, and the stretch of it that the calling warp owns.
template <bool kCached>
struct Row {
  const float* scores;
  const int8_t* code;  // null: every position is prunable
  uint32_t floor;      // keys of prunable positions below it count as dropped
  uint32_t* cache;  // [N] in shared memory, used if kCached; otherwise keys are computed again in every pass
  int begin, end;

  __device__ Row(const float* scores, const int8_t* code, uint32_t floor, int N, uint32_t* cache)
      : scores(scores), code(code), floor(floor), cache(cache) {
    const int stretch = (N + kThreads - 1) / kThreads * kWarpSize;
    begin = min(N, int(threadIdx.x / kWarpSize) * stretch);
    end = min(N, begin + stretch);
  }

  __device__ uint32_t compute(int i) const {
    const int c = code == nullptr ? 0 : code[i];
    if (c != 0) return c == 1 ? kForced : kDropped;
    const uint32_t key = order_key(scores[i]);
    return key < floor ? kDropped : key;
  }

  __device__ uint32_t key(int i) const { return kCached ? cache[i] : compute(i); }
};

// Fill the cache; return how many positions of the row are forced (high word) and prunable (low word).
template <bool kCached>
__device__ uint64_t load_row(const Row<kCached>& row, Shared& shared) {
  uint64_t counts = 0;
  for (int i = row.begin + threadIdx.x % kWarpSize; i < row.end; i += kWarpSize) {
    const uint32_t key = row.compute(i);
    if (kCached) row.cache[i] = key;
    counts += key == kForced ? uint64_t(1) << 32 : key != kDropped;
  }
  return block_scan<kThreads>(counts, shared.pair_sums).total;
}

// Find the rank-th largest key, 1 <= rank <= keys that are not dropped. The histogram must be zero.
template <bool kCached>
__device__ Threshold find_threshold(const Row<kCached>& row, uint32_t rank, Shared& shared) {
  // The last round repeats the lowest bit of the round before: it is the same in all keys still counted.
  constexpr int kShift[kRounds] = {21, 10, 0};
  uint32_t prefix = 0, known = 0;  // the digits found so far, and the mask of their bits
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int shift = kShift[round];
    for (int i = row.begin + threadIdx.x % kWarpSize; i < row.end; i += kWarpSize) {
      const uint32_t key = row.key(i);
      if ((key & known) == prefix) atomicAdd(&shared.histogram[(key >> shift) % kBins], 1u);
    }
    __syncthreads();
    // Thread t owns kBinsPerThread bins, from the top; it clears them for the next round as it reads them.
    const int top = kBins - 1 - threadIdx.x * kBinsPerThread;
    uint32_t bins[kBinsPerThread], sum = 0;
#pragma unroll
    for (int j = 0; j < kBinsPerThread; ++j) {
      sum += bins[j] = shared.histogram[top - j];
      shared.histogram[top - j] = 0;
    }
    uint32_t above = block_scan<kThreads>(sum, shared.warp_sums).before;
#pragma unroll
    for (int j = 0; j < kBinsPerThread; ++j) {
      if (above < rank && rank <= above + bins[j]) {  // in one thread only
        shared.digit = top - j;
        shared.rank = rank - above;
      }
      above += bins[j];
    }
    __syncthreads();
    prefix |= shared.digit << shift;
    known |= uint32_t(kBins - 1) << shift;
    rank = shared.rank;
  }
  return {prefix, rank};
}

// Write the kept positions of this warp's stretch to their slots, counted from `first`.
template <bool kCached>
__device__ void emit(const Row<kCached>& row, Threshold threshold, int64_t* index, uint32_t width, int first,
                     Shared& shared) {
  const int lane = threadIdx.x % kWarpSize;
  uint64_t counts = 0;  // above the threshold (high word) and equal to it (low word)
  for (int i = row.begin + lane; i < row.end; i += kWarpSize) {
    const uint32_t key = row.key(i);
    counts += key > threshold.key ? uint64_t(1) << 32 : key == threshold.key;
  }
  const uint64_t before = block_scan<kThreads>(counts, shared.pair_sums).before;
  const uint64_t start = __shfl_sync(kFullWarp, before, 0);  // of the stretch
  uint32_t above = uint32_t(start >> 32), equal = uint32_t(start);
  const uint32_t lower_lanes = (1u << lane) - 1;
  for (int base = row.begin; base < row.end; base += kWarpSize) {
    const int i = base + lane;
    const uint32_t key = i < row.end ? row.key(i) : kDropped;
    const uint32_t above_lanes = __ballot_sync(kFullWarp, key > threshold.key);
    const uint32_t equal_lanes = __ballot_sync(kFullWarp, key == threshold.key);
    const uint32_t tie = equal + __popc(equal_lanes & lower_lanes);  // equal keys at lower positions
    const uint32_t slot = above + __popc(above_lanes & lower_lanes) + min(tie, threshold.ties);
    const bool kept = key > threshold.key || (key == threshold.key && tie < threshold.ties);
    if (kept && slot < width) index[slot] = first + i;
    above += __popc(above_lanes);
    equal += __popc(equal_lanes);
  }
}

// Write `first` + the kept positions of the row, ascending, and -1 behind them; return how many are kept.
template <bool kCached>
__device__ uint32_t select_row(const Row<kCached>& row, int64_t keep, int64_t* index, int width, int first,
                               Shared& shared) {
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.histogram[bin] = 0;
  const uint64_t counts = load_row(row, shared);
  const int64_t forced = counts >> 32, prunable = uint32_t(counts);
  const uint32_t kept = uint32_t(forced + min(max(keep, int64_t(0)), prunable));
  if (kept > 0) {
    Threshold threshold{0, 0};  // above key 0 lies every position that is there
    if (kept < uint32_t(forced + prunable))
      threshold = find_threshold(row, kept, shared);
    else
      __syncthreads();  // the next scan overwrites sums that other warps may still read
    emit(row, threshold, index, width, first, shared);
  }
  for (int64_t slot = int64_t(kept) + threadIdx.x; slot < width; slot += kThreads) index[slot] = -1;
  return kept;
}

// One block an SM is enough (B is small); without the 1, nvcc makes room for two and spills.
template <bool kCached>
__global__ void __launch_bounds__(kThreads, 1) select_topk_kernel(const SelectTopkArgs args) {
  extern __shared__ uint64_t shared_memory[];  // Shared, then the keys of the row if kCached
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int64_t b = blockIdx.x;
  const int64_t keep = args.keep == nullptr ? args.keep_all : args.keep[b * args.keep_stride];
  uint32_t floor = 0;
  if (args.has_threshold)
    floor = floor_key(args.threshold == nullptr ? args.threshold_all
                                                : args.threshold[b * args.threshold_stride]);
  const Row<kCached> row(args.scores + b * args.scores_stride,
                         args.code == nullptr ? nullptr : args.code + b * args.code_stride, floor, args.N,
                         reinterpret_cast<uint32_t*>(&shared + 1));
  const uint32_t kept = select_row(row, keep, args.index + b * args.width, args.width, 0, shared);
  if (threadIdx.x == 0) args.count[b] = kept;
}

// Rows of up to N keys: cached in shared memory if they fit there, else read again from global memory in each
// pass; N may go up to 2^30.
template <class Args>
cudaError_t launch(void (*cached)(Args), void (*uncached)(Args), const Args& args, int blocks, int N,
                   cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const size_t cached_bytes = sizeof(Shared) + sizeof(uint32_t) * N;
  const bool fits = cached_bytes <= size_t(limit);
  const auto kernel = fits ? cached : uncached;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = fits ? cached_bytes : sizeof(Shared);
  config.stream = stream;
  if (config.dynamicSmemBytes > kSharedWithoutOptIn) {
    // Always the device's limit, never this call's need: threads that launch at the same time agree on it.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace select_topk

// Launch on `stream` of the current device.
inline cudaError_t launch_select_topk(const SelectTopkArgs& args, cudaStream_t stream) {
  using namespace select_topk;
  return launch(select_topk_kernel<true>, select_topk_kernel<false>, args, args.B, args.N, stream);
}

}  // namespace vlmprune
