// What every launcher here needs beside PyTorch's stable ABI: argument errors, current stream, launch errors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

// The only symbol that a PyTorch without CUDA lacks: weak, so that the library still loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace vlmprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& x) {
  std::ostringstream text;
  const char* separator = "[";
  for (int64_t d = 0; d < x.dim(); ++d, separator = ", ") text << separator << x.size(d);
  text << (x.dim() == 0 ? "[] " : "] ") << x.scalar_type() << " with strides [";
  for (int64_t d = 0; d < x.dim(); ++d) text << (d == 0 ? "" : ", ") << x.stride(d);
  text << "] on device " << x.get_device_index();
  return text.str();
}

// Raises RuntimeError in Python.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline void check(bool ok, const char* argument, const char* expected, const Tensor& got) {
  if (!ok) fail(argument, ": expected ", expected, ", got ", describe(got));
}

inline bool same_device(const Tensor& x, const Tensor& y) {
  return x.is_cuda() == y.is_cuda() && x.get_device_index() == y.get_device_index();
}

inline cudaStream_t current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op) {
  if (error != cudaSuccess) fail(op, ": ", cudaGetErrorString(error));
}

}  // namespace vlmprune
