// Position-sorted top-k of each segment of a row (specification: vlmprune/ops/reference.py).
//
// A segment is a row of select_topk, and the host knows its first slot: no block waits for another.
// Grid: (B * segments), one block a segment.
#pragma once

#include "vlmprune/select_topk.cuh"

namespace vlmprune {

constexpr int kMaxSegments = 256;  // of one launch

// By value in the launch. Segment s lies at starts[s] <= i < starts[s + 1], its slots likewise.
struct Segments {
  int count;
  int starts[kMaxSegments + 1], slots[kMaxSegments + 1];
};

struct SelectSegmentsArgs {
  const float* scores;  // [B, N], rows scores_stride elements apart
  int64_t scores_stride;
  int64_t* index;  // [B, width], contiguous, output
  int B, width;
  int longest;  // of the segments
  Segments segments;
};

namespace select_topk {

template <bool kCached>
__global__ void __launch_bounds__(kThreads, 1) select_segments_kernel(const SelectSegmentsArgs args) {
  extern __shared__ uint64_t shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int64_t b = blockIdx.x / args.segments.count;
  const int s = blockIdx.x % args.segments.count;
  const int start = args.segments.starts[s], slot = args.segments.slots[s];
  const int width = args.segments.slots[s + 1] - slot;
  const Row<kCached> row(args.scores + b * args.scores_stride + start, nullptr, 0,
                         args.segments.starts[s + 1] - start, reinterpret_cast<uint32_t*>(&shared + 1));
  select_row(row, width, args.index + b * args.width + slot, width, start, shared);
}

}  // namespace select_topk

// Launch on `stream` of the current device.
inline cudaError_t launch_select_segments(const SelectSegmentsArgs& args, cudaStream_t stream) {
  using namespace select_topk;
  return launch(select_segments_kernel<true>, select_segments_kernel<false>, args,
                args.B * args.segments.count, args.longest, stream);
}

}  // namespace vlmprune
