// Row gather of up to 64 tensors in one launch (specification: vlmprune/ops/reference.py):
//   out_t[b, h, k, :] = source_t[b, h, index[b, k], :], zeros where that is no row of source_t.
//
// Memory bound: each kept row is read once and written once, in words of 16 bytes where alignment allows.
// What one sample and head put out is one contiguous run of words. A tile is kTileWords of it, whatever the
// rows are: positions of 8 bytes and hidden states of 8 KB fill their blocks alike, and all writes are
// coalesced.
// Grid: (sum over tensors of B * heads * tiles), one block a tile.
#pragma once

#include "vlmprune/tensor_rows.cuh"

namespace vlmprune {

namespace gather_tokens {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // words a thread loads before it stores the first
constexpr int kTileWords = kThreads * kInFlight;

struct Tensor {
  TensorRows rows;
  char* out;
  uint32_t tiles;  // of one sample and head
  uint32_t first_unit;
  int word;
};

template <class Word>
__device__ void copy_tile(const Tensor& tensor, const int64_t* index, int64_t K, uint32_t unit) {
  const TensorRows& rows = tensor.rows;
  const uint32_t run = unit / tensor.tiles;  // b * heads + h
  const int64_t b = run / rows.heads, h = run % rows.heads;
  const int64_t first = int64_t(unit % tensor.tiles) * kTileWords;
  // One wide division a block; the others are narrow, since a row has less than 2^31 words.
  const uint32_t row_words = uint32_t(rows.row_bytes / sizeof(Word));
  const int64_t first_k = first / row_words;
  const uint32_t first_word = uint32_t(first % row_words);

  index += b * K;
  const char* source = rows.data + b * rows.batch_stride + h * rows.head_stride;
  Word* out = reinterpret_cast<Word*>(tensor.out) + run * K * row_words + first;
  Word x[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const uint32_t word = first_word + threadIdx.x + i * kThreads;
    const int64_t k = first_k + word / row_words;
    const int64_t row = k < K ? index[k] : -1;
    x[i] = Word();
    if (row >= 0 && row < rows.S)
      x[i] = reinterpret_cast<const Word*>(source + row * rows.row_stride)[word % row_words];
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const uint32_t offset = threadIdx.x + i * kThreads;
    if (first + offset < K * row_words) out[offset] = x[i];
  }
}

__global__ void __launch_bounds__(kThreads) gather_tokens_kernel(const __grid_constant__ Batch<Tensor> batch) {
  const Tensor& tensor = batch.tensors[find_tensor(batch.tensors, batch.count, blockIdx.x)];
  const uint32_t unit = blockIdx.x - tensor.first_unit;
  with_word(tensor.word, [&](auto word) { copy_tile<decltype(word)>(tensor, batch.index, batch.K, unit); });
}

}  // namespace gather_tokens

// Launch on `stream` of the current device. A row has less than 2^31 bytes.
inline cudaError_t launch_gather_tokens(const RowsArgs& args, cudaStream_t stream) {
  using namespace gather_tokens;
  const auto describe = [&](int i, gather_tokens::Tensor& tensor) {
    tensor.out = args.outs[i];
    tensor.word = word_bytes(tensor.rows, tensor.out);
    const int64_t words = args.K * (tensor.rows.row_bytes / tensor.word);
    tensor.tiles = uint32_t((words + kTileWords - 1) / kTileWords);
    return int64_t(tensor.tiles);
  };
  return launch_batches(gather_tokens_kernel, args, describe, kThreads, stream);
}

}  // namespace vlmprune
