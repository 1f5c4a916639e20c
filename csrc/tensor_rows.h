// What the launchers that move rows of many tensors share: checks, and a tensor as the kernels see it.
#pragma once

#include <string>
#include <vector>

#include "stable.h"
#include "vlmprune/tensor_rows.cuh"

namespace vlmprune {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMaxRowBytes = 1ll << 30;  // words of a row are counted in 32 bits

// index int64 [B, K]; tensors of rank 3 [B, S, D] or 4 [B, heads, S, D], contiguous last dim. Where they are
// only `read` also of rank 2 [B, S], any strides, and with a first dim of 1 for a larger batch.
inline void check_rows(const Tensors& tensors, const char* argument, const Tensor& index, bool read) {
  check(index.dim() == 2 && index.scalar_type() == ScalarType::Long, "index", "int64 [B, K]", index);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    const std::string name = std::string(argument) + "[" + std::to_string(i) + "]";
    const int64_t dims = x.dim();
    check((read && dims == 2) || dims == 3 || dims == 4, name.c_str(), read ? "rank 2 to 4" : "rank 3 or 4",
          x);
    check(x.size(0) == index.size(0) || (read && x.size(0) == 1), name.c_str(), "the batch size of index",
          x);
    check(dims == 2 || x.size(dims - 1) <= 1 || x.stride(dims - 1) == 1, name.c_str(),
          "a contiguous last dim", x);
    check(dims == 2 || x.size(dims - 1) <= kMaxRowBytes / int64_t(x.element_size()), name.c_str(),
          "rows of at most 2^30 bytes", x);
    check(same_device(x, index), name.c_str(), "the device of index", x);
  }
}

// `x`, which passed check_rows, for a batch of B.
inline TensorRows rows_of(const Tensor& x, int64_t B) {
  const int64_t dims = x.dim(), bytes = int64_t(x.element_size());
  const int64_t length = dims == 4 ? 2 : 1;  // the dim of the rows
  // The stride of a dim of one element is never used, and may be anything.
  const auto stride = [&](int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d) * bytes; };
  TensorRows rows = {};
  rows.data = static_cast<char*>(x.data_ptr());
  rows.batch_stride = B == 1 ? 0 : stride(0);
  rows.head_stride = dims == 4 ? stride(1) : 0;
  rows.row_stride = stride(length);
  rows.S = x.size(length);
  rows.row_bytes = dims == 2 ? bytes : x.size(dims - 1) * bytes;
  rows.heads = dims == 4 ? int(x.size(1)) : 1;
  return rows;
}

// Launch on the current device for tensors that passed check_rows; `outs` is empty if they change in place.
inline void launch_rows(cudaError_t (*launch)(const RowsArgs&, cudaStream_t), const char* op,
                        const Tensors& tensors, const Tensors& outs, const Tensor& any_index) {
  const Tensor index = torch::stable::contiguous(any_index);
  std::vector<TensorRows> rows;
  std::vector<char*> pointers;
  for (const Tensor& x : tensors) rows.push_back(rows_of(x, index.size(0)));
  for (const Tensor& x : outs) pointers.push_back(static_cast<char*>(x.data_ptr()));
  const RowsArgs args = {rows.data(), pointers.data(), int(rows.size()),
                         static_cast<const int64_t*>(index.data_ptr()), index.size(0), index.size(1)};
  check_launch(launch(args, current_stream(index.get_device_index())), op);
}

}  // namespace vlmprune
