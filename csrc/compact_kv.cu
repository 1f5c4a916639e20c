// Torch-facing launcher of compact_kv: checks, device guard, current stream.
#include "tensor_rows.h"
#include "vlmprune/compact_kv.cuh"

namespace vlmprune {
namespace {

void compact(Tensors caches, Tensor index) {
  check_rows(caches, "caches", index, false);
  for (const Tensor& x : caches)
    check(index.size(1) <= x.size(x.dim() - 2), "index", "no more columns than a cache has rows", index);
  const torch::stable::accelerator::DeviceGuard guard(index.get_device_index());
  launch_rows(launch_compact_kv, "compact_kv", caches, {}, index);
}

}  // namespace
}  // namespace vlmprune

STABLE_TORCH_LIBRARY_FRAGMENT(_vlmprune_C, m) {
  m.def("compact_kv(Tensor(a!)[] caches, Tensor index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(_vlmprune_C, CUDA, m) { m.impl("compact_kv", TORCH_BOX(&vlmprune::compact)); }
