// The dtypes that the launchers of this folder take.
#pragma once

namespace i2i {
namespace cuda {

enum class Dtype { kHalf, kBf16, kFloat, kDouble };

}  // namespace cuda
}  // namespace i2i
