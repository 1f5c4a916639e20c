// Torch-facing launcher of select_topk: checks, outputs, device guard, current stream.
#include <algorithm>
#include <optional>
#include <tuple>

#include "stable.h"
#include "vlmprune/select_topk.cuh"

namespace vlmprune {
namespace {

constexpr int64_t kMaxSize = 1 << 30;  // positions are 32-bit in the kernel, and may run past N by a segment

// One number a row, or (null) one for all of them.
template <class T>
struct PerRow {
  const Tensor* rows;
  T all;
};

void check_inputs(const Tensor& scores, const Tensor* keep, const Tensor* code, const Tensor* threshold,
                  int64_t width) {
  const ScalarType dtype = scores.scalar_type();
  check(scores.dim() == 2 &&
            (dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
        "scores", "float32, float16 or bfloat16 [B, N]", scores);
  const int64_t B = scores.size(0), N = scores.size(1);
  check(B <= kMaxSize && N <= kMaxSize, "scores", "at most 2^30 rows and columns", scores);
  const auto one_a_row = [&](const Tensor& x, ScalarType type) {
    return x.dim() == 1 && x.size(0) == B && x.scalar_type() == type && same_device(x, scores);
  };
  if (keep != nullptr)
    check(one_a_row(*keep, ScalarType::Long), "keep", "int64 [B] on the device of scores", *keep);
  if (code != nullptr) {
    check(code->dim() == 2 && code->size(0) == B && code->size(1) == N &&
              code->scalar_type() == ScalarType::Char && same_device(*code, scores),
          "code", "int8 [B, N] on the device of scores", *code);
  }
  if (threshold != nullptr) {
    check(one_a_row(*threshold, ScalarType::Float), "threshold", "float32 [B] on the device of scores",
          *threshold);
  }
  if (width < 0) fail("width: expected 0 or more, got ", width);
}

// The same values with a contiguous last dim; a copy only where it is needed.
Tensor contiguous_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor> run(Tensor scores, PerRow<int64_t> keep, std::optional<Tensor> code, int64_t width,
                               std::optional<PerRow<float>> threshold) {
  check_inputs(scores, keep.rows, code ? &*code : nullptr, threshold ? threshold->rows : nullptr, width);
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
  args.keep = keep.rows == nullptr ? nullptr : static_cast<const int64_t*>(keep.rows->data_ptr());
  args.keep_stride = keep.rows == nullptr ? 0 : keep.rows->stride(0);
  args.keep_all = keep.all;
  args.code = code ? static_cast<const int8_t*>(code->data_ptr()) : nullptr;
  args.code_stride = code ? code->stride(0) : 0;
  args.has_threshold = threshold.has_value();
  if (threshold && threshold->rows != nullptr) {
    args.threshold = static_cast<const float*>(threshold->rows->data_ptr());
    args.threshold_stride = threshold->rows->stride(0);
  } else if (threshold) {
    args.threshold_all = threshold->all;
  }
  args.index = static_cast<int64_t*>(index.data_ptr());
  args.count = static_cast<int64_t*>(count.data_ptr());
  args.B = int(B);
  args.N = int(N);
  args.width = int(width);
  check_launch(launch_select_topk(args, current_stream(device)), "select_topk");
  return {index, count};
}

PerRow<int64_t> per_row(const Tensor& keep) { return {&keep, 0}; }
PerRow<int64_t> per_row(int64_t keep) { return {nullptr, keep}; }
PerRow<float> per_row(double threshold) { return {nullptr, float(threshold)}; }
std::optional<PerRow<float>> per_row(const std::optional<Tensor>& threshold) {
  if (!threshold) return std::nullopt;
  return PerRow<float>{&*threshold, 0};
}

template <class Keep, class Threshold>
std::tuple<Tensor, Tensor> select(Tensor scores, Keep keep, std::optional<Tensor> code, int64_t width,
                                  Threshold threshold) {
  return run(scores, per_row(keep), code, width, per_row(threshold));
}

constexpr auto with_keeps = select<Tensor, std::optional<Tensor>>;
constexpr auto with_keep = select<int64_t, std::optional<Tensor>>;
constexpr auto with_keeps_and_level = select<Tensor, double>;
constexpr auto with_keep_and_level = select<int64_t, double>;

}  // namespace
}  // namespace vlmprune

STABLE_TORCH_LIBRARY_FRAGMENT(_vlmprune_C, m) {
  m.def(
      "select_topk(Tensor scores, Tensor keep, Tensor? code, int width, Tensor? threshold=None) -> "
      "(Tensor index, Tensor count)");
  m.def(
      "select_topk.int(Tensor scores, int keep, Tensor? code, int width, Tensor? threshold=None) -> "
      "(Tensor index, Tensor count)");
  m.def(
      "select_topk.level(Tensor scores, Tensor keep, Tensor? code, int width, float threshold) -> "
      "(Tensor index, Tensor count)");
  m.def(
      "select_topk.int_level(Tensor scores, int keep, Tensor? code, int width, float threshold) -> "
      "(Tensor index, Tensor count)");
}

STABLE_TORCH_LIBRARY_IMPL(_vlmprune_C, CUDA, m) {
  m.impl("select_topk", TORCH_BOX(vlmprune::with_keeps));
  m.impl("select_topk.int", TORCH_BOX(vlmprune::with_keep));
  m.impl("select_topk.level", TORCH_BOX(vlmprune::with_keeps_and_level));
  m.impl("select_topk.int_level", TORCH_BOX(vlmprune::with_keep_and_level));
}
