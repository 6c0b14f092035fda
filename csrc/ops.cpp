// The extension i2i_dist._C: its ops, registered, and the facts of its build. Host compiler only, no CUDA header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "schemas.h"

#ifdef I2I_WITH_CUDA
#include "cuda/build.h"
#endif

namespace {

// ops/_library.py looks for this sentence in the file before it loads the extension into a torch of another release.
constexpr const char* kBuiltAgainst = "i2i_dist built against torch " TORCH_VERSION;

#ifdef I2I_WITH_CUDA
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
#endif

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["torch"] = std::string(kBuiltAgainst).substr(std::string(kBuiltAgainst).rfind(' ') + 1);
  const std::vector<std::string> ops{"patch_nce", "adalin", "instance_norm_act", "patch_gather"};
  facts["cpu"] = ops;
#ifdef _OPENMP
  facts["openmp"] = true;
#endif
  facts["cuda"] = std::vector<std::string>{};
#ifdef I2I_WITH_CUDA
  facts["cuda"] = ops;
  facts["cuda_version"] = version_text(i2i_cuda_runtime_version());
  facts["cuda_driver"] = version_text(i2i_cuda_driver_version());
  facts["cuda_archs"] = pybind11::str(i2i_cuda_archs()).attr("split")();
#endif
  return facts;
}

}  // namespace

TORCH_LIBRARY(i2i_dist, library) { i2i::define_schemas(library); }
TORCH_LIBRARY_IMPL(i2i_dist, CPU, library) { I2I_REGISTER(library, cpu); }
#ifdef I2I_WITH_CUDA
TORCH_LIBRARY_IMPL(i2i_dist, CUDA, library) { I2I_REGISTER(library, cuda); }
#endif

PYBIND11_MODULE(_C, module) {
  module.def("build_facts", &build_facts, "What this extension was built from and which native ops it holds.");
}
