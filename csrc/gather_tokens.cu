// Torch-facing launcher of gather_tokens: checks, outputs, device guard, current stream.
#include "tensor_rows.h"
#include "vlmprune/gather_tokens.cuh"

namespace vlmprune {
namespace {

// [B, K], [B, K, D] or [B, heads, K, D], not filled.
Tensor empty_output(const Tensor& x, int64_t B, int64_t K) {
  std::vector<int64_t> shape = {B};
  if (x.dim() == 4) shape.push_back(x.size(1));
  shape.push_back(K);
  if (x.dim() > 2) shape.push_back(x.size(x.dim() - 1));
  return torch::stable::new_empty(x, shape);
}

Tensors gather(Tensors tensors, Tensor index) {
  check_rows(tensors, "tensors", index, true);
  const torch::stable::accelerator::DeviceGuard guard(index.get_device_index());
  Tensors outs;
  for (const Tensor& x : tensors) outs.push_back(empty_output(x, index.size(0), index.size(1)));
  launch_rows(launch_gather_tokens, "gather_tokens", tensors, outs, index);
  return outs;
}

}  // namespace
}  // namespace vlmprune

STABLE_TORCH_LIBRARY_FRAGMENT(_vlmprune_C, m) {
  m.def("gather_tokens(Tensor[] tensors, Tensor index) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(_vlmprune_C, CUDA, m) { m.impl("gather_tokens", TORCH_BOX(&vlmprune::gather)); }
