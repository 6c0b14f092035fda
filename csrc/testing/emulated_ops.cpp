// The ops of launch/ and cuda/ as torch.ops.i2i_emulated.*, on CPU tensors, and what rules the emulation.
#include <string>
#include <string_view>

#include "../schemas.h"
#include "emulation.h"
#include "guarded_allocator.h"
#include "selftest.h"

namespace {

void set_schedule(int64_t seed, bool late) {
  i2i::emulation::set_schedule(static_cast<uint64_t>(seed),
                               late ? i2i::emulation::Landing::kLate : i2i::emulation::Landing::kEarly);
}

void selftest(std::string_view name, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const int error = i2i::cuda::launch_selftest(std::string(name), a.const_data_ptr(), b.const_data_ptr(),
                                               out.mutable_data_ptr<float>());
  TORCH_CHECK(error == 0, "there is no selftest of the name ", name, ".");
}

}  // namespace

TORCH_LIBRARY(i2i_emulated, library) {
  i2i::define_schemas(library);
  library.def("set_schedule(int seed, bool late) -> ()", &set_schedule);
  library.def("guard_memory(bool enable) -> ()", &i2i::emulation::guard_memory);
  library.def("selftest(str name, Tensor a, Tensor b, Tensor(c!) out) -> ()", &selftest);
}
TORCH_LIBRARY_IMPL(i2i_emulated, CPU, library) { I2I_REGISTER(library, cuda); }
