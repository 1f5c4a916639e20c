// The rows of many tensors, as one launch sees them: descriptors travel by value in the kernel's parameters,
// so nothing is copied to the device and a CUDA graph keeps them.
//
// A descriptor holds `TensorRows rows`, `uint32_t first_unit` (a unit is what one block works on) and `int
// word`, the bytes of the widest type in which its rows can be moved.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vlmprune {

constexpr int kMaxTensors = 64;                 // in one launch; a power of two
constexpr int64_t kMaxUnits = (1ll << 31) - 1;  // blocks in one launch
constexpr size_t kMaxParameterBytes = 32764;    // of a kernel, on compute capability 7.0 and newer

// Every row of a tensor [B, heads, S, row_bytes]; strides in bytes, batch_stride 0 = one sample serves all.
struct TensorRows {
  char* data;
  int64_t batch_stride, head_stride, row_stride;
  int64_t S, row_bytes;
  int heads;
};

// What an op is told: the rows of every tensor, where they go, and which.
struct RowsArgs {
  const TensorRows* tensors;  // [count], on the host
  char* const* outs;          // [count], on the host; each [B, heads, K, row_bytes], contiguous; or none
  int count;
  const int64_t* index;  // [B, K], contiguous
  int64_t B, K;
};

// Number of the descriptor that owns `unit`: the last one that starts at or below it.
template <class Tensor>
__device__ int find_tensor(const Tensor* tensors, int count, uint32_t unit) {
  int found = 0;
#pragma unroll
  for (int step = kMaxTensors / 2; step > 0; step /= 2)
    if (found + step < count && unit >= tensors[found + step].first_unit) found += step;
  return found;
}

// Bytes of the widest word that divides every address and every row: 1 to 16.
inline int word_bytes(const TensorRows& rows, const void* other) {
  const uint64_t bits = reinterpret_cast<uint64_t>(rows.data) | reinterpret_cast<uint64_t>(other) |
                        rows.row_bytes | rows.batch_stride | rows.head_stride | rows.row_stride | 16;
  return int(bits & -bits);
}

// visit(x) with x of the type that moves a word of so many bytes.
template <class Visit>
__device__ void with_word(int bytes, Visit visit) {
  switch (bytes) {
    case 16:
      return visit(uint4());
    case 8:
      return visit(uint64_t());
    case 4:
      return visit(uint32_t());
    case 2:
      return visit(uint16_t());
    default:
      return visit(uint8_t());
  }
}

// What one launch is told: up to kMaxTensors descriptors, and which rows.
template <class Tensor>
struct Batch {
  Tensor tensors[kMaxTensors];
  const int64_t* index;  // [B, K], contiguous
  int64_t K;
  int count;
};

// Launch `kernel`, one block of `threads` a unit, for every kMaxTensors of the tensors. `describe(i, tensor)`
// fills in tensor number i but for its rows and first unit, and returns how many units a head of it has.
template <class Tensor, class Describe>
cudaError_t launch_batches(void (*kernel)(Batch<Tensor>), const RowsArgs& args, Describe describe, int threads,
                           cudaStream_t stream) {
  static_assert(sizeof(Batch<Tensor>) <= kMaxParameterBytes);
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < args.count && error == cudaSuccess; first += kMaxTensors) {
    const int left = args.count - first;
    Batch<Tensor> batch = {{}, args.index, args.K, left < kMaxTensors ? left : kMaxTensors};
    int64_t units = 0;
    for (int i = 0; i < batch.count; ++i) {
      const TensorRows& rows = batch.tensors[i].rows = args.tensors[first + i];
      batch.tensors[i].first_unit = uint32_t(units);
      units += args.B * rows.heads * describe(first + i, batch.tensors[i]);
    }
    if (units == 0) continue;
    if (units > kMaxUnits) return cudaErrorInvalidValue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(units));
    config.blockDim = dim3(threads);
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, batch);
  }
  return error;
}

}  // namespace vlmprune
