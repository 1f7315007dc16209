// The part of onnxruntime's C interface that a custom operator needs.
//
// onnxruntime ships no headers in its Python packages. Its interface is a struct of callbacks
// that only ever grows at its end, and a table of functions whose places never change, so a few
// declarations of our own, with the places stated as numbers, serve every release from the one
// that has all of them on.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define AUSTEER_CALL __stdcall
#define AUSTEER_EXPORT extern "C" __declspec(dllexport)
#else
#define AUSTEER_CALL
#define AUSTEER_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace austeer::ort {

// In-place outputs came with onnxruntime 1.18.
constexpr std::uint32_t kApiVersion = 18;

struct Status;
struct Domain;
struct SessionOptions;
struct KernelInfo;
struct Context;
struct ShapeContext;
struct Value;
struct TypeShape;
struct Api;

struct ApiBase {
  const Api*(AUSTEER_CALL* get_api)(std::uint32_t version);
  const char*(AUSTEER_CALL* version_string)();
};

enum Element : int { kFloat = 1, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Code : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };

struct CustomOp {
  std::uint32_t version;
  void*(AUSTEER_CALL* create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(AUSTEER_CALL* name)(const CustomOp*);
  const char*(AUSTEER_CALL* provider)(const CustomOp*);
  int(AUSTEER_CALL* input_type)(const CustomOp*, std::size_t);
  std::size_t(AUSTEER_CALL* input_count)(const CustomOp*);
  int(AUSTEER_CALL* output_type)(const CustomOp*, std::size_t);
  std::size_t(AUSTEER_CALL* output_count)(const CustomOp*);
  void(AUSTEER_CALL* compute)(void*, Context*);
  void(AUSTEER_CALL* destroy_kernel)(void*);
  int(AUSTEER_CALL* input_characteristic)(const CustomOp*, std::size_t);
  int(AUSTEER_CALL* output_characteristic)(const CustomOp*, std::size_t);
  int(AUSTEER_CALL* input_memory)(const CustomOp*, std::size_t);
  int(AUSTEER_CALL* variadic_input_arity)(const CustomOp*);
  int(AUSTEER_CALL* variadic_input_homogeneity)(const CustomOp*);
  int(AUSTEER_CALL* variadic_output_arity)(const CustomOp*);
  int(AUSTEER_CALL* variadic_output_homogeneity)(const CustomOp*);
  Status*(AUSTEER_CALL* create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status*(AUSTEER_CALL* compute_v2)(void*, Context*);
  Status*(AUSTEER_CALL* infer_shape)(const CustomOp*, ShapeContext*);
  int(AUSTEER_CALL* start_version)(const CustomOp*);
  int(AUSTEER_CALL* end_version)(const CustomOp*);
  std::size_t(AUSTEER_CALL* may_inplace)(int**, int**);
  void(AUSTEER_CALL* release_may_inplace)(int*, int*);
  std::size_t(AUSTEER_CALL* alias_map)(int**, int**);
  void(AUSTEER_CALL* release_alias_map)(int*, int*);
};

// A function of the table by its place.
template <std::size_t Place, typename Result, typename... Arguments>
struct Function {
  Result operator()(const Api* api, Arguments... arguments) const noexcept {
    using Pointer = Result(AUSTEER_CALL*)(Arguments...);
    void* const* table = reinterpret_cast<void* const*>(api);
    return reinterpret_cast<Pointer>(table[Place])(arguments...);
  }
};

inline constexpr Function<0, Status*, int, const char*> create_status;
inline constexpr Function<26, Status*, const char*, Domain**> create_domain;
inline constexpr Function<27, Status*, Domain*, const CustomOp*> add_op;
inline constexpr Function<28, Status*, SessionOptions*, Domain*> add_domain;
inline constexpr Function<51, Status*, Value*, void**> tensor_data;
inline constexpr Function<61, Status*, const TypeShape*, std::size_t*> rank;
inline constexpr Function<62, Status*, const TypeShape*, std::int64_t*, std::size_t> dimensions;
inline constexpr Function<63, Status*, const TypeShape*, const char**, std::size_t> names;
inline constexpr Function<65, Status*, const Value*, TypeShape**> type_and_shape;
inline constexpr Function<90, Status*, const Context*, std::size_t, const Value**> input;
inline constexpr Function<91, Status*, Context*, std::size_t, const std::int64_t*, std::size_t,
                          Value**>
    output;
inline constexpr Function<99, void, TypeShape*> release_type_shape;
inline constexpr Function<193, Status*, const Context*, void**> stream;
inline constexpr Function<249, Status*, const KernelInfo*, std::size_t, int*, const Value**>
    constant_input;
inline constexpr Function<268, Status*, const ShapeContext*, std::size_t, TypeShape**>
    input_shape;
inline constexpr Function<270, Status*, const ShapeContext*, std::size_t, const TypeShape*>
    set_output_shape;
inline constexpr Function<274, Status*, const Context*, void (*)(void*, std::size_t), std::size_t,
                          std::size_t, void*>
    parallel_for;

}  // namespace austeer::ort

// Hand on what went wrong.
#define AUSTEER_TRY(call) \
  if (::austeer::ort::Status* status = (call)) return status
