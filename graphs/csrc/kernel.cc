#include "kernel.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

namespace austeer {
namespace {

// Below so many bytes of a block, waking a thread costs more than the work.
constexpr std::size_t kBlockBytes = std::size_t{1} << 18;
constexpr std::size_t kLine = 64;
constexpr std::size_t kMostBlocks = 256;

ort::Status* invalid(const ort::Api* api, const std::string& message) {
  return ort::create_status(api, ort::kInvalidArgument, message.c_str());
}

struct ReleaseShape {
  const ort::Api* api;
  void operator()(ort::TypeShape* shape) const { ort::release_type_shape(api, shape); }
};

ort::Status* read_value(const ort::Api* api, const ort::Value* value, std::size_t number,
                        Input& input) {
  ort::TypeShape* raw = nullptr;
  AUSTEER_TRY(ort::type_and_shape(api, value, &raw));
  const std::unique_ptr<ort::TypeShape, ReleaseShape> shape(raw, ReleaseShape{api});
  AUSTEER_TRY(ort::rank(api, raw, &input.shape.rank));
  if (input.shape.rank > input.shape.dims.size()) {
    return invalid(api, "ai.austeer: input " + std::to_string(number) +
                            " has more than 8 dimensions");
  }
  AUSTEER_TRY(ort::dimensions(api, raw, input.shape.dims.data(), input.shape.rank));
  void* data = nullptr;
  AUSTEER_TRY(ort::tensor_data(api, const_cast<ort::Value*>(value), &data));
  input.data = data;
  return nullptr;
}

ort::Status* refuse(const Op& op, const char* name, const char* expected) {
  return invalid(op.api, std::string("ai.austeer ") + op.name(&op) + ": " + name + ": expected " +
                             expected);
}

bool has_dims(const Input& input, std::initializer_list<std::size_t> dims) {
  return std::equal(dims.begin(), dims.end(), input.shape.dims.begin(),
                    input.shape.dims.begin() + input.shape.rank,
                    [](std::size_t a, std::int64_t b) { return a == static_cast<std::size_t>(b); });
}

// The CPU kernels keep places as 32-bit numbers.
constexpr std::size_t kMostWidth = 0x7fffffff;

constexpr const char* kOnce = "each unit once";

// What the session's constants cannot change in any run is asked here, once.
ort::Status* check_constants(const Kernel& kernel) {
  const Input& idx = kernel.constants[1];
  if (idx.data == nullptr) return nullptr;
  const auto first = static_cast<const std::int64_t*>(idx.data);
  std::vector<std::int64_t> sorted(first, first + idx.shape.size());
  std::sort(sorted.begin(), sorted.end());
  const bool twice = std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end();
  return twice ? refuse(kernel.op, "idx", kOnce) : nullptr;
}

ort::Status* check(const Kernel& kernel, const std::array<Input, kMostInputs>& inputs, Site& site,
                   std::size_t width) {
  const Op& op = kernel.op;
  const bool adaptive = op.adaptive;
  const auto number = [&](std::size_t input) {
    return static_cast<const float*>(inputs[input].data);
  };
  site = {};
  site.idx = static_cast<const std::int64_t*>(inputs[1].data);
  site.k = inputs[1].shape.size();
  site.gamma = number(2);
  site.scale = number(adaptive ? 6 : 3);
  if (width > kMostWidth) return refuse(op, "x", "a last axis of at most 2147483647");
  if (inputs[1].shape.rank != 1) return refuse(op, "idx", "[k]");
  if (!has_dims(inputs[2], {site.k})) return refuse(op, "gamma", "one number for each index, [k]");
  if (!has_dims(inputs[adaptive ? 6 : 3], {1})) return refuse(op, "scale", "one number, [1]");
  if (adaptive) {
    if (inputs[3].shape.rank != 2) return refuse(op, "V", "[k, r]");
    site.V = number(3);
    site.b = number(4);
    site.U = number(5);
    site.r = static_cast<std::size_t>(inputs[3].shape.dims[1]);
    if (site.r < 1 || site.r > kMaxRank) return refuse(op, "V", "a rank r from 1 to 64");
    if (!has_dims(inputs[3], {site.k, site.r})) return refuse(op, "V", "[k, r]");
    if (!has_dims(inputs[4], {site.r})) return refuse(op, "b", "[r]");
    if (!has_dims(inputs[5], {site.r, site.k})) return refuse(op, "U", "[r, k]");
  }
  // On a GPU the indices cannot be read from here; the kernel leaves out those outside.
  if (op.cuda) return nullptr;
  if (!inside(site.idx, site.k, width)) {
    return refuse(op, "idx", "numbers from 0 to the width of x, less one");
  }
  const bool fed = kernel.constants[1].data == nullptr;
  return fed && !distinct(site.idx, site.k, width) ? refuse(op, "idx", kOnce) : nullptr;
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
  const std::ptrdiff_t element = size_of(work.type);
  const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(first) * work.rows.step * element;
  Rows rows = work.rows;
  rows.tokens = std::min(work.block, work.rows.tokens - first);
  rows.x = static_cast<const char*>(rows.x) + offset;
  rows.y = static_cast<char*>(rows.y) + offset;
  rows.more = first + rows.tokens < work.rows.tokens;
  steer_cpu(work.type, work.site, rows);
}

// Begin with the rows that are still in a cache. What wrote them ended with the last one, but a
// node directly before this one on the same activations ended where it did. The same address
// under another node is taken for that; where it is a buffer used again, no more is lost than what
// the cache held.
Rows from_the_warm_end(const Kernel& kernel, Rows rows) {
  thread_local const void* latest_rows = nullptr;
  thread_local const Kernel* latest_node = nullptr;
  thread_local bool from_last = false;
  const bool behind = rows.y == latest_rows && &kernel != latest_node;
  from_last = !behind || !from_last;
  latest_rows = rows.y;
  latest_node = &kernel;
  if (!from_last) return rows;
  const std::size_t last = (rows.tokens - 1) * rows.width * size_of(kernel.op.type);
  rows.x = static_cast<const char*>(rows.x) + last;
  rows.y = static_cast<char*>(rows.y) + last;
  rows.step = -rows.step;
  return rows;
}

ort::Status* run_on_cpu(const Kernel& kernel, const ort::Context* context, const Site& site,
                        Rows rows) {
  const Op& op = kernel.op;
  std::size_t touched = rows.width * size_of(op.type);
  // In place, of a token only the cache lines that hold a unit; without units, one.
  if (rows.x == rows.y) {
    touched = std::min(touched, (site.k + 1) * kLine);
    rows = from_the_warm_end(kernel, rows);
  }
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

}  // namespace

ort::Status* make_kernel(const Op& op, const ort::KernelInfo* info,
                         std::unique_ptr<Kernel>& kernel) {
  auto made = std::make_unique<Kernel>(op);
  // On a GPU none has been tried.
  for (std::size_t number = 1; !op.cuda && number < inputs_of(op); ++number) {
    int constant = 0;
    const ort::Value* value = nullptr;
    AUSTEER_TRY(ort::constant_input(op.api, info, number, &constant, &value));
    if (constant == 0 || value == nullptr) continue;
    AUSTEER_TRY(read_value(op.api, value, number, made->constants[number]));
  }
  AUSTEER_TRY(check_constants(*made));
  kernel = std::move(made);
  return nullptr;
}

ort::Status* run(const Kernel& kernel, ort::Context* context) {
  const Op& op = kernel.op;
  const ort::Api* api = op.api;
  std::array<Input, kMostInputs> inputs = kernel.constants;
  for (std::size_t number = 0; number < inputs_of(op); ++number) {
    if (inputs[number].data != nullptr) continue;
    const ort::Value* value = nullptr;
    AUSTEER_TRY(ort::input(api, context, number, &value));
    AUSTEER_TRY(read_value(api, value, number, inputs[number]));
  }
  const Shape& shape = inputs[0].shape;
  if (shape.rank == 0) return invalid(api, "ai.austeer: x: expected at least one dimension");
  ort::Value* output = nullptr;
  AUSTEER_TRY(ort::output(api, context, 0, shape.dims.data(), shape.rank, &output));
  void* y = nullptr;
  AUSTEER_TRY(ort::tensor_data(api, output, &y));
  const auto width = static_cast<std::size_t>(shape.dims[shape.rank - 1]);
  Site site;
  AUSTEER_TRY(check(kernel, inputs, site, width));
  const std::size_t size = shape.size();
  if (size == 0) return nullptr;
  const auto step = static_cast<std::ptrdiff_t>(width);
  const Rows rows{inputs[0].data, y, size / width, width, step, false};
  if (!op.cuda) return run_on_cpu(kernel, context, site, rows);
  void* stream = nullptr;
  AUSTEER_TRY(ort::stream(api, context, &stream));
  const char* error = steer_cuda(op.type, site, rows, stream);
  return error == nullptr
             ? nullptr
             : ort::create_status(api, ort::kFail, (std::string("ai.austeer: ") + error).c_str());
}

}  // namespace austeer
