// Stands in for steer_cuda.cu in a build without nvcc.
#include "steer.h"

namespace austeer {

bool has_cuda() { return false; }

const char* steer_cuda(Type, const Site&, const Rows&, void*) {
  return "this library was built without CUDA";
}

}  // namespace austeer
