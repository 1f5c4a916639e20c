// Exclusive prefix sum over the threads of one block: warp shuffles, then one pass over the warps' totals.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vlmprune {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

template <class T>
struct Scan {
  T before;  // sum over the threads of lower index
  T total;   // sum over all threads
};

// Holds one barrier. `warp_sums [kThreads / 32]` is shared memory; put a barrier between two scans that share
// it.
template <int kThreads, class T>
__device__ Scan<T> block_scan(T value, T* warp_sums) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T inclusive = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T lower = __shfl_up_sync(kFullWarp, inclusive, distance);
    if (lane >= distance) inclusive += lower;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  Scan<T> scan{inclusive - value, 0};
#pragma unroll
  for (int w = 0; w < kThreads / kWarpSize; ++w) {
    if (w < warp) scan.before += warp_sums[w];
    scan.total += warp_sums[w];
  }
  return scan;
}

}  // namespace vlmprune
