// A node of a session: what is known of it when the session is made, and a run of it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "ort_abi.h"
#include "steer.h"

namespace austeer {

constexpr std::size_t kMostInputs = 7;

// One registered operator: a name, a type of x and y, and where it runs. The callbacks get a
// pointer to the base, so that must come first.
struct Op : ort::CustomOp {
  const ort::Api* api;
  Type type;
  bool adaptive;
  bool cuda;
};

inline const Op& as_op(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

inline std::size_t inputs_of(const Op& op) { return op.adaptive ? kMostInputs : 4; }

// Dimensions without an allocation: no activation has more than these.
struct Shape {
  std::array<std::int64_t, 8> dims;
  std::size_t rank;

  std::size_t size() const {
    std::size_t total = 1;
    for (std::size_t axis = 0; axis < rank; ++axis) total *= static_cast<std::size_t>(dims[axis]);
    return total;
  }
};

struct Input {
  const void* data;
  Shape shape;
};

// A node: its operator, and those of its inputs that are the same in every run. They stay where
// they are for as long as the session lives, and asking for them costs more than one token.
struct Kernel {
  explicit Kernel(const Op& from) : op(from) {}

  const Op& op;
  std::array<Input, kMostInputs> constants = {};  // no data: to be asked for in every run
};

// On success null, and the node in `kernel`.
ort::Status* make_kernel(const Op& op, const ort::KernelInfo* info,
                         std::unique_ptr<Kernel>& kernel);

// One call of the node.
ort::Status* run(const Kernel& kernel, ort::Context* context);

}  // namespace austeer
