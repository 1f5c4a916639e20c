// Torch-facing launcher of select_topk: checks, outputs, device guard, current stream.
#include <algorithm>
#include <optional>
#include <tuple>

#include "stable.h"
#include "vlmprune/select_topk.cuh"

namespace vlmprune {
namespace {

constexpr int64_t kMaxSize = 1 << 30;  // positions are 32-bit in the kernel, and may run past N by a segment

// `keep` null: one quota for every row.
void check_inputs(const Tensor& scores, const Tensor* keep, const Tensor* code, int64_t width) {
  const ScalarType dtype = scores.scalar_type();
  check(scores.dim() == 2 &&
            (dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
        "scores", "float32, float16 or bfloat16 [B, N]", scores);
  const int64_t B = scores.size(0), N = scores.size(1);
  check(B <= kMaxSize && N <= kMaxSize, "scores", "at most 2^30 rows and columns", scores);
  if (keep != nullptr) {
    check(keep->dim() == 1 && keep->size(0) == B && keep->scalar_type() == ScalarType::Long &&
              same_device(*keep, scores),
          "keep", "int64 [B] on the device of scores", *keep);
  }
  if (code != nullptr) {
    check(code->dim() == 2 && code->size(0) == B && code->size(1) == N &&
              code->scalar_type() == ScalarType::Char && same_device(*code, scores),
          "code", "int8 [B, N] on the device of scores", *code);
  }
  if (width < 0) fail("width: expected 0 or more, got ", width);
}

// The same values with a contiguous last dim; a copy only where it is needed.
Tensor contiguous_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor> run(Tensor scores, const Tensor* keep, int64_t keep_all,
                               std::optional<Tensor> code, int64_t width) {
  check_inputs(scores, keep, code ? &*code : nullptr, width);
  const int64_t B = scores.size(0), N = scores.size(1);
  const int32_t device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (scores.scalar_type() != ScalarType::Float) scores = torch::stable::to(scores, ScalarType::Float);
  scores = contiguous_rows(scores);
  if (code) code = contiguous_rows(*code);
  width = std::min(width, N);
  Tensor index = torch::stable::new_empty(scores, {B, width}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(scores, {B}, ScalarType::Long);

  SelectTopkArgs args = {};
  args.scores = static_cast<const float*>(scores.data_ptr());
  args.scores_stride = scores.stride(0);
  args.keep = keep == nullptr ? nullptr : static_cast<const int64_t*>(keep->data_ptr());
  args.keep_stride = keep == nullptr ? 0 : keep->stride(0);
  args.keep_all = keep_all;
  args.code = code ? static_cast<const int8_t*>(code->data_ptr()) : nullptr;
  args.code_stride = code ? code->stride(0) : 0;
  args.index = static_cast<int64_t*>(index.data_ptr());
  args.count = static_cast<int64_t*>(count.data_ptr());
  args.B = int(B);
  args.N = int(N);
  args.width = int(width);
  check_launch(launch_select_topk(args, current_stream(device)), "select_topk");
  return {index, count};
}

std::tuple<Tensor, Tensor> with_keep_tensor(Tensor scores, Tensor keep, std::optional<Tensor> code,
                                            int64_t width) {
  return run(scores, &keep, 0, code, width);
}

std::tuple<Tensor, Tensor> with_keep_int(Tensor scores, int64_t keep, std::optional<Tensor> code,
                                         int64_t width) {
  return run(scores, nullptr, keep, code, width);
}

}  // namespace
}  // namespace vlmprune

STABLE_TORCH_LIBRARY_FRAGMENT(_vlmprune_C, m) {
  m.def("select_topk(Tensor scores, Tensor keep, Tensor? code, int width) -> (Tensor index, Tensor count)");
  m.def("select_topk.int(Tensor scores, int keep, Tensor? code, int width) -> (Tensor index, Tensor count)");
}

STABLE_TORCH_LIBRARY_IMPL(_vlmprune_C, CUDA, m) {
  m.impl("select_topk", TORCH_BOX(&vlmprune::with_keep_tensor));
  m.impl("select_topk.int", TORCH_BOX(&vlmprune::with_keep_int));
}
