// at::parallel_for, with torch's number of threads.
#pragma once

#include <ATen/Parallel.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace i2i {
namespace cpu {

// Calls f(begin, end) for parts of [begin, end) of at least `grain` indices, on as many threads as torch uses.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
#ifdef _OPENMP
  // Some builds of torch bring an OpenMP runtime of their own, which alone was told how many threads to use.
  if (!at::in_parallel_region() && omp_get_max_threads() != at::get_num_threads()) {
    omp_set_num_threads(at::get_num_threads());
  }
#endif
  at::parallel_for(begin, end, grain, f);
}

}  // namespace cpu
}  // namespace i2i
