// What the CUDA objects of this build were compiled with.
#pragma once

extern "C" {

// The version of the CUDA runtime linked in, as 1000 * major + 10 * minor; 0 if the runtime does not tell.
int i2i_cuda_runtime_version();

// The newest version of CUDA that the driver here knows, likewise; 0 without a driver.
int i2i_cuda_driver_version();

// The architectures asked of nvcc, separated by spaces, such as "8.0 9.0 12.0+PTX".
const char* i2i_cuda_archs();
}
