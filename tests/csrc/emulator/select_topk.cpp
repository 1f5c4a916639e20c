// Entry points for ctypes: run the select kernels and their launch functions in the emulator.
#include "vlmprune/select_segments.cuh"
#include "vlmprune/select_topk.cuh"

namespace vlmprune::select_topk {
uint64_t shared_memory[emulator::kSharedBytes / sizeof(uint64_t)];
}

// Return 0, or 1 if the launch is refused, or 2 if the kernel breaks a rule of the emulator.
template <class Args>
int emulate(cudaError_t (*launch)(const Args&, cudaStream_t), const Args& args, int shared_limit, unsigned seed,
            unsigned skipped_barrier) {
  emulator::shared = reinterpret_cast<unsigned char*>(vlmprune::select_topk::shared_memory);
  emulator::shared_limit = shared_limit;
  emulator::opted_in = false;
  emulator::order.seed(seed);
  emulator::skipped_barrier = skipped_barrier;
  try {
    return launch(args, nullptr) == cudaSuccess ? 0 : 1;
  } catch (const std::runtime_error&) {
    return 2;
  }
}

extern "C" int emulate_select_topk(const vlmprune::SelectTopkArgs* args, int shared_limit, unsigned seed,
                                   unsigned skipped_barrier) {
  return emulate(vlmprune::launch_select_topk, *args, shared_limit, seed, skipped_barrier);
}

extern "C" int emulate_select_segments(const vlmprune::SelectSegmentsArgs* args, int shared_limit,
                                       unsigned seed) {
  return emulate(vlmprune::launch_select_segments, *args, shared_limit, seed, 0);
}
