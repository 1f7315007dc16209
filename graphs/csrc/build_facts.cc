#include "steer.h"

#ifndef AUSTEER_CUDA_ARCHITECTURES
#define AUSTEER_CUDA_ARCHITECTURES ""
#endif

namespace austeer {

const char* build_facts() {
  return "{\"compiler\": \"" __VERSION__ "\", \"cuda\": \"" AUSTEER_CUDA_ARCHITECTURES "\"}";
}

}  // namespace austeer
