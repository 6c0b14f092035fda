// Small kernels that prove the emulation, or that break a rule which it must enforce.
#pragma once

#include <cstdint>
#include <string>

namespace i2i {
namespace cuda {

// Runs the kernel of this name; what a, b and out are stands beside each.
int launch_selftest(const std::string& name, const void* a, const void* b, float* out);

}  // namespace cuda
}  // namespace i2i
