// Entry point for ctypes: run the select_topk kernel and its launch function in the emulator.
#include "vlmprune/select_topk.cuh"

namespace vlmprune::select_topk {
uint64_t shared_memory[emulator::kSharedBytes / sizeof(uint64_t)];
}

// Return 0, or 1 if the launch is refused, or 2 if the kernel breaks a rule of the emulator.
extern "C" int emulate(const vlmprune::SelectTopkArgs* args, int shared_limit, unsigned seed,
                       unsigned skipped_barrier) {
  emulator::shared = reinterpret_cast<unsigned char*>(vlmprune::select_topk::shared_memory);
  emulator::shared_limit = shared_limit;
  emulator::opted_in = false;
  emulator::order.seed(seed);
  emulator::skipped_barrier = skipped_barrier;
  try {
    return vlmprune::launch_select_topk(*args, nullptr) == cudaSuccess ? 0 : 1;
  } catch (const std::runtime_error&) {
    return 2;
  }
}
