// Registration of the operators with onnxruntime, and what its callbacks do.
#include <algorithm>
#include <array>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "steer.h"

namespace austeer {
namespace {

constexpr const char* kDomain = "ai.austeer";
constexpr const char* kCudaProvider = "CUDAExecutionProvider";
// Below so many bytes of a block, waking a thread costs more than the work.
constexpr std::size_t kBlockBytes = std::size_t{1} << 18;
constexpr std::size_t kLine = 64;
constexpr std::size_t kMostBlocks = 256;

// One registered operator: a name, a type of x and y, and where it runs. The callbacks get a
// pointer to the base, so that must come first.
struct Op : ort::CustomOp {
  const ort::Api* api;
  Type type;
  bool adaptive;
  bool cuda;
};

int element(Type type) {
  switch (type) {
    case Type::kFloat: return ort::kFloat;
    case Type::kFloat16: return ort::kFloat16;
    case Type::kBFloat16: return ort::kBFloat16;
  }
  return 0;
}

const Op& as_op(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

std::size_t inputs_of(const Op& op) { return op.adaptive ? 7 : 4; }

ort::Status* invalid(const ort::Api* api, const std::string& message) {
  return ort::create_status(api, ort::kInvalidArgument, message.c_str());
}

struct ReleaseShape {
  const ort::Api* api;
  void operator()(ort::TypeShape* shape) const { ort::release_type_shape(api, shape); }
};

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
  const ort::Value* value;
  const void* data;
  Shape shape;
};

#define AUSTEER_TRY(call) \
  if (ort::Status* status = (call)) return status

ort::Status* read_input(const ort::Api* api, const ort::Context* context, std::size_t number,
                        Input& input) {
  AUSTEER_TRY(ort::input(api, context, number, &input.value));
  ort::TypeShape* raw = nullptr;
  AUSTEER_TRY(ort::type_and_shape(api, input.value, &raw));
  const std::unique_ptr<ort::TypeShape, ReleaseShape> shape(raw, ReleaseShape{api});
  AUSTEER_TRY(ort::rank(api, raw, &input.shape.rank));
  if (input.shape.rank > input.shape.dims.size()) {
    return invalid(api, "ai.austeer: input " + std::to_string(number) +
                            " has more than 8 dimensions");
  }
  AUSTEER_TRY(ort::dimensions(api, raw, input.shape.dims.data(), input.shape.rank));
  void* data = nullptr;
  AUSTEER_TRY(ort::tensor_data(api, const_cast<ort::Value*>(input.value), &data));
  input.data = data;
  return nullptr;
}

ort::Status* check(const Op& op, const std::array<Input, 7>& inputs, Site& site,
                   std::size_t width) {
  const ort::Api* api = op.api;
  const bool adaptive = op.adaptive;
  const auto number = [&](std::size_t input) {
    return static_cast<const float*>(inputs[input].data);
  };
  site = {};
  site.idx = static_cast<const std::int64_t*>(inputs[1].data);
  site.k = inputs[1].shape.size();
  site.gamma = number(2);
  site.scale = number(adaptive ? 6 : 3);
  const auto refuse = [&](const char* name, const char* expected) {
    return invalid(api, std::string("ai.austeer ") + op.name(&op) + ": " + name +
                            ": expected " + expected);
  };
  if (inputs[1].shape.rank != 1) return refuse("idx", "[k]");
  if (inputs[2].shape.size() != site.k) return refuse("gamma", "one number for each index");
  if (inputs[adaptive ? 6 : 3].shape.size() != 1) return refuse("scale", "one number");
  if (adaptive) {
    if (inputs[3].shape.rank != 2) return refuse("V", "[k, r]");
    site.V = number(3);
    site.b = number(4);
    site.U = number(5);
    site.r = static_cast<std::size_t>(inputs[3].shape.dims[1]);
    if (site.r < 1 || site.r > kMaxRank) return refuse("V", "a rank r from 1 to 64");
    if (inputs[3].shape.size() != site.k * site.r) return refuse("V", "[k, r]");
    if (inputs[4].shape.size() != site.r) return refuse("b", "[r]");
    if (inputs[5].shape.size() != site.k * site.r) return refuse("U", "[r, k]");
  }
  // On a GPU the indices cannot be read from here; the kernel leaves out those outside.
  if (!op.cuda && !inside(site.idx, site.k, width)) {
    return refuse("idx", "numbers from 0 to the width of x, less one");
  }
  return nullptr;
}

struct Work {
  Type type;
  Site site;
  Rows rows;
  std::size_t block;
};

void run_block(void* data, std::size_t number) {
  const Work& work = *static_cast<const Work*>(data);
  const std::size_t first = number * work.block;
  const std::size_t step = work.rows.width * size_of(work.type);
  Rows rows = work.rows;
  rows.tokens = std::min(work.block, work.rows.tokens - first);
  rows.x = static_cast<const char*>(rows.x) + first * step;
  rows.y = static_cast<char*>(rows.y) + first * step;
  steer_cpu(work.type, work.site, rows);
}

ort::Status* run_on_cpu(const Op& op, const ort::Context* context, const Site& site,
                        const Rows& rows) {
  std::size_t touched = rows.width * size_of(op.type);
  // In place, of a token only the cache lines that hold a unit; without units, one.
  if (rows.x == rows.y) touched = std::min(touched, (site.k + 1) * kLine);
  if (site.V != nullptr) touched += 2 * site.k * site.r * sizeof(float);
  std::size_t block = std::max<std::size_t>(1, kBlockBytes / touched);
  block = std::max(block, (rows.tokens + kMostBlocks - 1) / kMostBlocks);
  const std::size_t blocks = (rows.tokens + block - 1) / block;
  Work work{op.type, site, rows, block};
  if (blocks <= 1) {
    steer_cpu(work.type, site, rows);
    return nullptr;
  }
  return ort::parallel_for(op.api, context, run_block, blocks, 0, &work);
}

ort::Status* run(const Op& op, ort::Context* context) {
  const ort::Api* api = op.api;
  std::array<Input, 7> inputs;
  for (std::size_t number = 0; number < inputs_of(op); ++number) {
    AUSTEER_TRY(read_input(api, context, number, inputs[number]));
  }
  const Shape& shape = inputs[0].shape;
  if (shape.rank == 0) return invalid(api, "ai.austeer: x: expected at least one dimension");
  ort::Value* output = nullptr;
  AUSTEER_TRY(ort::output(api, context, 0, shape.dims.data(), shape.rank, &output));
  void* y = nullptr;
  AUSTEER_TRY(ort::tensor_data(api, output, &y));
  const auto width = static_cast<std::size_t>(shape.dims[shape.rank - 1]);
  Site site;
  AUSTEER_TRY(check(op, inputs, site, width));
  const std::size_t size = shape.size();
  if (size == 0) return nullptr;
  const Rows rows{inputs[0].data, y, size / width, width};
  if (!op.cuda) return run_on_cpu(op, context, site, rows);
  void* stream = nullptr;
  AUSTEER_TRY(ort::stream(api, context, &stream));
  const char* error = steer_cuda(op.type, site, rows, stream);
  return error == nullptr
             ? nullptr
             : ort::create_status(api, ort::kFail, (std::string("ai.austeer: ") + error).c_str());
}

// y has the shape of x. Where a dimension has neither a number nor a name, nothing is said:
// two such dimensions would count as different ones.
ort::Status* infer_shape(const ort::CustomOp* op, ort::ShapeContext* context) {
  const ort::Api* api = as_op(op).api;
  ort::TypeShape* shape = nullptr;
  AUSTEER_TRY(ort::input_shape(api, context, 0, &shape));
  std::size_t rank = 0;
  AUSTEER_TRY(ort::rank(api, shape, &rank));
  std::vector<std::int64_t> dims(rank);
  std::vector<const char*> names(rank, "");
  AUSTEER_TRY(ort::dimensions(api, shape, dims.data(), rank));
  AUSTEER_TRY(ort::names(api, shape, names.data(), rank));
  for (std::size_t axis = 0; axis < rank; ++axis) {
    const bool named = names[axis] != nullptr && names[axis][0] != '\0';
    if (dims[axis] < 0 && !named) return nullptr;
  }
  return rank == 0 ? nullptr : ort::set_output_shape(api, context, 0, shape);
}

#undef AUSTEER_TRY

// No exception may cross into onnxruntime.
template <typename Work>
ort::Status* guarded(const ort::Api* api, Work work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    return ort::create_status(api, ort::kFail, error.what());
  } catch (...) {
    return ort::create_status(api, ort::kFail, "ai.austeer: an unknown error");
  }
}

int type_of_input(const ort::CustomOp* op, std::size_t number) {
  return number == 0 ? element(as_op(op).type) : number == 1 ? ort::kInt64 : ort::kFloat;
}

Op make_op(const ort::Api* api, Type type, bool adaptive, bool cuda) {
  Op op{};
  op.api = api;
  op.type = type;
  op.adaptive = adaptive;
  op.cuda = cuda;
  op.version = ort::kApiVersion;
  op.name = [](const ort::CustomOp* self) {
    return as_op(self).adaptive ? "SteerAUAdaptive" : "SteerAU";
  };
  op.provider = [](const ort::CustomOp* self) -> const char* {
    return as_op(self).cuda ? kCudaProvider : nullptr;
  };
  op.input_type = type_of_input;
  op.input_count = [](const ort::CustomOp* self) { return inputs_of(as_op(self)); };
  op.output_type = [](const ort::CustomOp* self, std::size_t) {
    return element(as_op(self).type);
  };
  op.output_count = [](const ort::CustomOp*) { return std::size_t{1}; };
  const auto required = [](const ort::CustomOp*, std::size_t) { return 0; };
  op.input_characteristic = required;
  op.output_characteristic = required;
  op.input_memory = [](const ort::CustomOp*, std::size_t) { return 0; };
  const auto none = [](const ort::CustomOp*) { return 0; };
  op.variadic_input_arity = none;
  op.variadic_input_homogeneity = none;
  op.variadic_output_arity = none;
  op.variadic_output_homogeneity = none;
  // A kernel needs no state but its operator, which outlives every session.
  op.create_kernel_v2 = [](const ort::CustomOp* self, const ort::Api*, const ort::KernelInfo*,
                           void** kernel) -> ort::Status* {
    *kernel = const_cast<ort::CustomOp*>(self);
    return nullptr;
  };
  op.destroy_kernel = [](void*) {};
  op.compute_v2 = [](void* kernel, ort::Context* context) {
    const Op& self = as_op(static_cast<const ort::CustomOp*>(kernel));
    return guarded(self.api, [&] { return run(self, context); });
  };
  op.infer_shape = [](const ort::CustomOp* self, ort::ShapeContext* context) {
    return guarded(as_op(self).api, [&] { return infer_shape(self, context); });
  };
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 1; };
  op.may_inplace = [](int** inputs, int** outputs) {
    static int zero = 0;
    *inputs = *outputs = &zero;
    return std::size_t{1};
  };
  op.release_may_inplace = [](int*, int*) {};
  op.alias_map = [](int**, int**) { return std::size_t{0}; };
  op.release_alias_map = [](int*, int*) {};
  return op;
}

// The operators of one onnxruntime; a process may hold several, each with its own table.
struct Registry {
  const ort::Api* api;
  std::vector<Op> ops;
  ort::Domain* domain = nullptr;
};

ort::Status* fill(Registry& registry) {
  const ort::Api* api = registry.api;
  for (const bool cuda : {false, true}) {
    if (cuda && !has_cuda()) continue;
    for (const bool adaptive : {false, true}) {
      for (const Type type : {Type::kFloat, Type::kFloat16, Type::kBFloat16}) {
        registry.ops.push_back(make_op(api, type, adaptive, cuda));
      }
    }
  }
  if (ort::Status* status = ort::create_domain(api, kDomain, &registry.domain)) return status;
  for (const Op& op : registry.ops) {
    if (ort::Status* status = ort::add_op(api, registry.domain, &op)) return status;
  }
  return nullptr;
}

// Sessions refer to operators and domain for as long as they live, so neither is ever freed.
ort::Status* add_to(ort::SessionOptions* options, const ort::Api* api) {
  static std::mutex mutex;
  static auto& registries = *new std::vector<std::unique_ptr<Registry>>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = std::find_if(registries.begin(), registries.end(),
                                  [&](const auto& registry) { return registry->api == api; });
  if (known != registries.end()) return ort::add_domain(api, options, (*known)->domain);
  auto registry = std::make_unique<Registry>();
  registry->api = api;
  if (ort::Status* status = fill(*registry)) return status;
  registries.push_back(std::move(registry));
  return ort::add_domain(api, options, registries.back()->domain);
}

}  // namespace
}  // namespace austeer

AUSTEER_EXPORT austeer::ort::Status* AUSTEER_CALL RegisterCustomOps(
    austeer::ort::SessionOptions* options, const austeer::ort::ApiBase* base) {
  using namespace austeer;
  const ort::Api* api = base->get_api(ort::kApiVersion);
  if (api == nullptr) {
    const std::string message = std::string("austeer's operators need onnxruntime 1.18 or ") +
                                "newer, this is " + base->version_string();
    return ort::create_status(base->get_api(1), ort::kNotImplemented, message.c_str());
  }
  return guarded(api, [&] { return add_to(options, api); });
}

// For `austeer-export doctor`: what this library was built for.
AUSTEER_EXPORT const char* austeer_build() { return austeer::build_facts(); }
