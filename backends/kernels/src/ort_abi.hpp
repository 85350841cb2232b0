// The part of ONNX Runtime's C interface that a custom operator needs, declared from its public documentation (no header ships with the
// Python package). The function table only ever grows at its end, so a place in it is for good; API 17 (ONNX Runtime 1.17) has all of these.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t API_VERSION = 17;

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;

enum Code { FAIL = 1, INVALID_ARGUMENT = 2 };
enum ElementType { FLOAT = 1, UINT8 = 2, INT64 = 7 };

// The table as an array of pointers; each function's place stands beside its type.
struct Api {
  void* const at[275];

  template <class F> F* function(int place) const { return (F*)at[place]; }
  Status* create_status(int code, const char* text) const { return function<Status*(int, const char*)>(0)(code, text); }
  Status* create_domain(const char* name, CustomOpDomain** out) const { return function<Status*(const char*, CustomOpDomain**)>(26)(name, out); }
  Status* add_to_domain(CustomOpDomain* d, const struct CustomOp* op) const { return function<Status*(CustomOpDomain*, const CustomOp*)>(27)(d, op); }
  Status* add_domain(SessionOptions* o, CustomOpDomain* d) const { return function<Status*(SessionOptions*, CustomOpDomain*)>(28)(o, d); }
  Status* tensor_data(const Value* v, void** out) const { return function<Status*(const Value*, void**)>(51)(v, out); }
  Status* element_count(const TensorInfo* i, size_t* out) const { return function<Status*(const TensorInfo*, size_t*)>(64)(i, out); }
  Status* dimensions_count(const TensorInfo* i, size_t* out) const { return function<Status*(const TensorInfo*, size_t*)>(61)(i, out); }
  Status* dimensions(const TensorInfo* i, int64_t* out, size_t n) const { return function<Status*(const TensorInfo*, int64_t*, size_t)>(62)(i, out, n); }
  Status* tensor_info(const Value* v, TensorInfo** out) const { return function<Status*(const Value*, TensorInfo**)>(65)(v, out); }
  Status* input_count(const KernelContext* c, size_t* out) const { return function<Status*(const KernelContext*, size_t*)>(88)(c, out); }
  Status* input(const KernelContext* c, size_t i, const Value** out) const { return function<Status*(const KernelContext*, size_t, const Value**)>(90)(c, i, out); }
  Status* output(KernelContext* c, size_t i, const int64_t* dims, size_t n, Value** out) const {
    return function<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(c, i, dims, n, out);
  }
  void release_status(Status* s) const { function<void(Status*)>(93)(s); }
  void release_tensor_info(TensorInfo* i) const { function<void(TensorInfo*)>(99)(i); }
  Status* attribute(const KernelInfo* i, const char* name, int64_t* out) const { return function<Status*(const KernelInfo*, const char*, int64_t*)>(86)(i, name, out); }
  Status* constant_input(const KernelInfo* i, size_t n, int* is_constant, const Value** out) const {
    return function<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(i, n, is_constant, out);
  }
  Status* parallel_for(const KernelContext* c, void (*task)(void*, size_t), size_t total, size_t batches, void* data) const {
    return function<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(c, task, total, batches, data);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*version)();
};

// What a custom operator is: its schema and callbacks, in this order. Unused places of version 17 stay null.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*input_kind)(const CustomOp*, size_t);
  int (*output_kind)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_alike)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_alike)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shapes)(const CustomOp*, void*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  void* later[4];  // of version 18
};

}  // namespace ort
