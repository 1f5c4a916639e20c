// Row gather of up to 64 tensors in place, in one launch (specification: vlmprune/ops/reference.py):
//   cache_t[b, h, k, :] = cache_t[b, h, index[b, k], :], left as it was where that is no row of cache_t.
//
// Memory bound: each row that moves is read once and written once; a row that stays is not touched.
// A row may be the source of one move and the target of another, so the moves of one tensor, sample, head and
// slice of columns are a chain, which one block walks from the left. The index ascends, so index[k] >= k: a
// row that this step writes can be a source of this step (hence the barrier) but of no later one.
// Grid: (sum over tensors of B * heads * slices), one block a chain.
#pragma once

#include "vlmprune/tensor_rows.cuh"

namespace vlmprune {

namespace compact_kv {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;      // words a thread loads before the barrier
constexpr int kSliceBytes = 128;  // at most: whole cache lines, and enough chains where heads are few

struct Tensor {
  TensorRows rows;
  uint32_t slices;
  uint32_t first_unit;
  int word;
};

template <class Word>
__device__ void walk_chain(const Tensor& tensor, const int64_t* index, int64_t K, uint32_t unit) {
  const TensorRows& rows = tensor.rows;
  const uint32_t slice = unit % tensor.slices, run = unit / tensor.slices;  // run = b * heads + h
  const int64_t b = run / rows.heads, h = run % rows.heads;
  const uint32_t row_words = uint32_t(rows.row_bytes / sizeof(Word));
  const int width = (row_words + tensor.slices - 1) / tensor.slices;  // words of a slice, at most
  const int rows_at_once = kThreads / width;
  const int lane_row = threadIdx.x / width;
  const uint32_t word = slice * width + threadIdx.x % width;
  const bool works = lane_row < rows_at_once && word < row_words;

  index += b * K;
  Word* const column =
      reinterpret_cast<Word*>(rows.data + b * rows.batch_stride + h * rows.head_stride) + word;
  const int64_t row_stride = rows.row_stride / int64_t(sizeof(Word));
  for (int64_t first = 0; first < K; first += kInFlight * rows_at_once) {
    Word x[kInFlight];
    bool moves[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t k = first + i * rows_at_once + lane_row;
      const int64_t row = works && k < K ? index[k] : -1;
      moves[i] = row > k && row < rows.S;
      if (moves[i]) x[i] = column[row * row_stride];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (moves[i]) column[(first + i * rows_at_once + lane_row) * row_stride] = x[i];
  }
}

__global__ void __launch_bounds__(kThreads) compact_kv_kernel(const __grid_constant__ Batch<Tensor> batch) {
  const Tensor& tensor = batch.tensors[find_tensor(batch.tensors, batch.count, blockIdx.x)];
  const uint32_t unit = blockIdx.x - tensor.first_unit;
  with_word(tensor.word, [&](auto word) { walk_chain<decltype(word)>(tensor, batch.index, batch.K, unit); });
}

}  // namespace compact_kv

// Launch on `stream` of the current device. The index ascends in each row; a row has less than 2^31 bytes.
inline cudaError_t launch_compact_kv(const RowsArgs& args, cudaStream_t stream) {
  using namespace compact_kv;
  if (args.K == 0) return cudaSuccess;
  const auto describe = [](int, compact_kv::Tensor& tensor) {
    tensor.slices = uint32_t((tensor.rows.row_bytes + kSliceBytes - 1) / kSliceBytes);
    tensor.word = word_bytes(tensor.rows, nullptr);
    return int64_t(tensor.slices);
  };
  return launch_batches(compact_kv_kernel, args, describe, kThreads, stream);
}

}  // namespace vlmprune
