// What the CUDA objects of this build were compiled with. Torch-free, like every file here.
#include <cuda_runtime_api.h>

#include "build.h"

int i2i_cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int i2i_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* i2i_cuda_archs() { return I2I_CUDA_ARCHS; }
