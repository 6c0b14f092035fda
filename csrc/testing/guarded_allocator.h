// Memory of CPU tensors between guards, for what the emulation cannot see: reads and writes outside global memory.
#pragma once

namespace i2i {
namespace emulation {

// Allocates CPU tensors of all of torch, from here on, between guards: NaN in every floating dtype, like the memory
// itself, so that what is read there or was never written shows. false goes back to torch's own allocator, and raises
// if a guard of any of the tensors was written to.
void guard_memory(bool enable);

}  // namespace emulation
}  // namespace i2i
