// Torch-facing launcher of select_segments: checks, output, device guard, current stream.
#include <algorithm>
#include <numeric>
#include <vector>

#include "stable.h"
#include "vlmprune/select_segments.cuh"

namespace vlmprune {
namespace {

constexpr int64_t kMaxSize = 1 << 30;  // positions are 32-bit in the kernel, and may run past N by a stretch
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

void check_inputs(const Tensor& scores, const std::vector<int64_t>& segments,
                  const std::vector<int64_t>& quotas) {
  const ScalarType dtype = scores.scalar_type();
  check(scores.dim() == 2 &&
            (dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
        "scores", "float32, float16 or bfloat16 [B, N]", scores);
  check(scores.size(0) <= kMaxBlocks / kMaxSegments && scores.size(1) <= kMaxSize, "scores",
        "at most 2^23 - 1 rows and 2^30 columns", scores);
  const int64_t total = std::accumulate(segments.begin(), segments.end(), int64_t(0));
  if (total != scores.size(1))
    fail("segments: expected lengths that add up to ", scores.size(1), ", got ", total);
  if (quotas.size() != segments.size())
    fail("quotas: expected one for each of ", segments.size(), " segments, got ", quotas.size());
  for (size_t s = 0; s < segments.size(); ++s) {
    if (quotas[s] < 0 || quotas[s] > segments[s])
      fail("quotas: expected 0 to the ", segments[s], " positions of segment ", s, ", got ", quotas[s]);
  }
}

Tensor run(Tensor scores, std::vector<int64_t> segments, std::vector<int64_t> quotas) {
  check_inputs(scores, segments, quotas);
  const int64_t B = scores.size(0), width = std::accumulate(quotas.begin(), quotas.end(), int64_t(0));
  const int32_t device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (scores.scalar_type() != ScalarType::Float) scores = torch::stable::to(scores, ScalarType::Float);
  if (scores.size(1) > 1 && scores.stride(1) != 1) scores = torch::stable::contiguous(scores);
  Tensor index = torch::stable::new_empty(scores, {B, width}, ScalarType::Long);

  SelectSegmentsArgs args = {};
  args.scores = static_cast<const float*>(scores.data_ptr());
  args.scores_stride = scores.stride(0);
  args.index = static_cast<int64_t*>(index.data_ptr());
  args.B = int(B);
  args.width = int(width);
  const cudaStream_t stream = current_stream(device);
  int start = 0, slot = 0;
  for (size_t first = 0; first < segments.size() && width > 0; first += kMaxSegments) {
    const size_t count = std::min(segments.size() - first, size_t(kMaxSegments));
    args.segments.count = int(count);
    args.longest = 0;
    for (size_t s = 0; s < count; ++s) {
      args.segments.starts[s] = start;
      args.segments.slots[s] = slot;
      start += int(segments[first + s]);
      slot += int(quotas[first + s]);
      args.longest = std::max(args.longest, int(segments[first + s]));
    }
    args.segments.starts[count] = start;
    args.segments.slots[count] = slot;
    check_launch(launch_select_segments(args, stream), "select_segments");
  }
  return index;
}

}  // namespace
}  // namespace vlmprune

STABLE_TORCH_LIBRARY_FRAGMENT(_vlmprune_C, m) {
  m.def("select_segments(Tensor scores, int[] segments, int[] quotas) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(_vlmprune_C, CUDA, m) {
  m.impl("select_segments", TORCH_BOX(&vlmprune::run));
}
