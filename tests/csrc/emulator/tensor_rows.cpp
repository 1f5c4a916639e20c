// The ops that move rows, with their Torch-facing launchers, on CPU tensors: each kernel runs in the
// emulator.
#include "tensor_rows.h"

#include "vlmprune/compact_kv.cuh"
#include "vlmprune/gather_tokens.cuh"

// What a launcher asks of the GPU's driver. Everything else of it runs as it is.
struct NoGuard {
  explicit NoGuard(int32_t) {}
};

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace torch::stable::accelerator {
using EmulatedGuard = NoGuard;
}

#define DeviceGuard EmulatedGuard
#define CUDA CPU  // the dispatch key
#define _vlmprune_C _vlmprune_emulated

#include "compact_kv.cu"
#include "gather_tokens.cu"

extern "C" void configure(unsigned seed, unsigned skipped_barrier) {
  emulator::order.seed(seed);
  emulator::skipped_barrier = skipped_barrier;
  emulator::launches = 0;
}

extern "C" unsigned launches() { return emulator::launches; }

extern "C" int word_bytes(const vlmprune::TensorRows* rows, const void* other) {
  return vlmprune::word_bytes(*rows, other);
}
