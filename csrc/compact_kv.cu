// Torch-facing launcher of compact_kv: checks, device guard, current stream.
#include "tensor_rows.h"
#include "vlmprune/compact_kv.cuh"

namespace vlmprune {
namespace {

void compact(Tensors caches, Tensor index) {
  check_index(index);
  check_rows(caches, "caches", index, false, false);
  const int64_t B = index.size(0), K = index.size(1);
  for (const Tensor& x : caches)
    check(K <= x.size(x.dim() - 2), "index", "no more columns than a cache has rows", index);
  const int32_t device = index.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  index = torch::stable::contiguous(index);

  std::vector<TensorRows> rows;
  for (const Tensor& x : caches) rows.push_back(rows_of(x, B));
  const CompactKvArgs args = {rows.data(), int(rows.size()), static_cast<const int64_t*>(index.data_ptr()), B,
                              K};
  check_launch(launch_compact_kv(args, current_stream(device)), "compact_kv");
}

}  // namespace
}  // namespace vlmprune

STABLE_TORCH_LIBRARY_FRAGMENT(_vlmprune_C, m) {
  m.def("compact_kv(Tensor(a!)[] caches, Tensor index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(_vlmprune_C, CUDA, m) { m.impl("compact_kv", TORCH_BOX(&vlmprune::compact)); }
