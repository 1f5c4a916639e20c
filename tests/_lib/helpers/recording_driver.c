/* Stands in for libcuda.so.1: it notes what is launched, with the parameters, and starts nothing.
 *
 * It has what Triton's launcher and its loader of binaries call. Its device is an H100 with nothing in it.
 */
#include "cuda.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FUNCTIONS = 4096, MAX_PARAMETERS = 512, MAX_ATTRIBUTES = 4 };

typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block, shared, n_attributes, attributes[MAX_ATTRIBUTES];
  uint64_t parameters[MAX_PARAMETERS];
} Launch;

static Launch *launches;
static int n_launches, capacity;

/* A driver reads the sizes of a kernel's parameters off its binary; here they are told, in bytes. */
static unsigned char sizes[MAX_FUNCTIONS][MAX_PARAMETERS];
static int n_parameters[MAX_FUNCTIONS], n_functions = 1;

void recorder_describe(uint64_t function, const unsigned char *bytes, int n) {
  memcpy(sizes[function], bytes, n);
  n_parameters[function] = n;
}

int recorder_count(void) { return n_launches; }

const Launch *recorder_launch(int i) { return &launches[i]; }

void recorder_clear(void) { n_launches = 0; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  if (n_launches == capacity) {
    capacity = capacity ? 2 * capacity : 64;
    launches = realloc(launches, capacity * sizeof(Launch));
    if (!launches)
      return CUDA_ERROR_OUT_OF_MEMORY;
  }
  uint64_t function = (uint64_t)f;
  Launch launch = {.function = function,
                   .stream = (uint64_t)config->hStream,
                   .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
                   .block = config->blockDimX,
                   .shared = config->sharedMemBytes,
                   .n_attributes = config->numAttrs};
  for (unsigned i = 0; i < config->numAttrs; i++)
    launch.attributes[i] = config->attrs[i].id;
  for (int i = 0; i < n_parameters[function]; i++)
    memcpy(&launch.parameters[i], parameters[i], sizes[function][i]);
  launches[n_launches++] = launch;
  return CUDA_SUCCESS;
}

/* A function is a number, so that one that is loaded twice is told apart. */
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (n_functions == MAX_FUNCTIONS)
    return CUDA_ERROR_OUT_OF_MEMORY;
  *function = (CUfunction)(uint64_t)n_functions++;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1024;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

/* Any pointer may be read on this device. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **words) {
  *words = "refused by the recording driver";
  return CUDA_SUCCESS;
}

#define CONTEXT ((CUcontext)1)

CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = CONTEXT, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = CONTEXT, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
