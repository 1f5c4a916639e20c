// The part of CUDA the kernels use, on the CPU: every CUDA thread is a fiber, blocks run one after another.
//
// A thread runs until its next barrier or warp exchange, then another one does, in an order drawn from a
// seed. So a run is repeatable, a missing barrier gives a wrong result under most seeds, and a barrier or
// warp exchange that only some threads reach is an error. The memory ordering of a real GPU is out of scope.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
#define __grid_constant__
using std::max;
using std::min;

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 threadIdx, blockIdx;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 32 * 1024, kSharedWithoutOptIn = 48 * 1024, kSharedBytes = 512 * 1024;
constexpr unsigned char kPoison = 0xCD;

enum class State { kAtWarp, kAtBarrier, kDone };

struct Fiber {
  State state;
  unsigned barriers, exchanges;
  uint64_t offered[2];  // to the warp; two, because a lane may offer again before its neighbours have read
  ucontext_t context;
};

inline int shared_limit;          // bytes a block can get after opting in
inline unsigned skipped_barrier;  // left out to prove that it is needed; 1 = the first, 0 = none
inline unsigned char* shared;  // [kSharedBytes], the kernel's dynamic shared memory, or null if it has none
inline unsigned launches;      // so far
inline bool opted_in;
inline std::mt19937 order;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline ucontext_t scheduler;

inline Fiber& self() { return fibers[threadIdx.x]; }

inline void stop(State state) {
  self().state = state;
  swapcontext(&self().context, &scheduler);
}

inline void fiber_main() {
  body();
  stop(State::kDone);
}

inline bool all(unsigned first, unsigned count, State state) {
  return std::all_of(&fibers[first], &fibers[first] + count,
                     [&](const Fiber& f) { return f.state == state; });
}

inline std::vector<unsigned> shuffled(unsigned first, unsigned last, unsigned step) {
  std::vector<unsigned> v;
  for (unsigned i = first; i < last; i += step) v.push_back(i);
  std::shuffle(v.begin(), v.end(), order);
  return v;
}

// Run the lanes of a warp until none of them waits for the others.
inline void run_warp(unsigned first) {
  do {
    for (unsigned lane : shuffled(first, first + kLanes, 1)) {
      threadIdx.x = lane;
      swapcontext(&scheduler, &fibers[lane].context);
    }
  } while (all(first, kLanes, State::kAtWarp));
}

inline void run_block(unsigned threads, size_t shared_bytes) {
  static const std::unique_ptr<char[]> stacks(new char[1024 * kStackBytes]);
  if (shared != nullptr) std::fill_n(shared, kSharedBytes, kPoison);
  fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.barriers = fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = &stacks[t * kStackBytes];
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, fiber_main, 0);
  }
  do {
    for (unsigned first : shuffled(0, threads, kLanes)) run_warp(first);
  } while (all(0, threads, State::kAtBarrier));
  if (!all(0, threads, State::kDone)) throw std::runtime_error("threads wait at different points");
  if (shared != nullptr && !std::all_of(shared + shared_bytes, shared + kSharedBytes,
                                        [](unsigned char c) { return c == kPoison; }))
    throw std::runtime_error("write past the end of shared memory");
}

// Show a value to the warp; once all lanes have, return what each of them showed.
template <class T>
struct Exchange {
  unsigned slot;
  explicit Exchange(T value) : slot(self().exchanges++ % 2) {
    std::memcpy(&self().offered[slot], &value, sizeof(T));
    stop(State::kAtWarp);
  }
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, &fibers[threadIdx.x / kLanes * kLanes + lane].offered[slot], sizeof(T));
    return value;
  }
};

}  // namespace emulator

inline void __syncthreads() {
  if (++emulator::self().barriers != emulator::skipped_barrier) emulator::stop(emulator::State::kAtBarrier);
}

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  return emulator::Exchange<T>(value)[lane];
}

template <class T>
T __shfl_up_sync(uint32_t, T value, unsigned distance) {
  const emulator::Exchange<T> values(value);
  const unsigned lane = threadIdx.x % emulator::kLanes;
  return values[lane < distance ? lane : lane - distance];
}

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  const emulator::Exchange<bool> votes(vote);
  uint32_t ballot = 0;
  for (unsigned lane = 0; lane < emulator::kLanes; ++lane) ballot |= uint32_t(votes[lane]) << lane;
  return ballot;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline uint32_t atomicAdd(uint32_t* p, uint32_t v) {
  const uint32_t old = *p;
  *p += v;
  return old;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "the launch is refused"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::shared_limit;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  emulator::opted_in = bytes <= emulator::shared_limit;
  return emulator::opted_in ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Kernel, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, Args... args) {
  const size_t limit = emulator::opted_in ? size_t(emulator::shared_limit) : emulator::kSharedWithoutOptIn;
  if (config->gridDim.x == 0 || config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  emulator::body = [=] { kernel(args...); };
  ++emulator::launches;
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x)
    emulator::run_block(config->blockDim.x, config->dynamicSmemBytes);
  return cudaSuccess;
}
