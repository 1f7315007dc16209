// Registration of the operators with onnxruntime, and what its callbacks do.
#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernel.h"

namespace austeer {
namespace {

constexpr const char* kDomain = "ai.austeer";
constexpr const char* kCudaProvider = "CUDAExecutionProvider";

int element(Type type) {
  switch (type) {
    case Type::kFloat: return ort::kFloat;
    case Type::kFloat16: return ort::kFloat16;
    case Type::kBFloat16: return ort::kBFloat16;
  }
  return 0;
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
  op.create_kernel_v2 = [](const ort::CustomOp* self, const ort::Api*,
                           const ort::KernelInfo* info, void** kernel) {
    return guarded(as_op(self).api, [&] {
      std::unique_ptr<Kernel> made;
      ort::Status* status = make_kernel(as_op(self), info, made);
      *kernel = made.release();
      return status;
    });
  };
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.compute_v2 = [](void* kernel, ort::Context* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return guarded(self.op.api, [&] { return run(self, context); });
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
