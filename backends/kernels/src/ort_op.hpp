// What our operators share under ONNX Runtime: errors passed on, shapes, the session's threads, an operator's table of callbacks.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "chain.hpp"
#include "ort_abi.hpp"

#define RETURN_IF_WRONG(call) \
  if (ort::Status* status = (call)) return status

namespace structured {

constexpr size_t MOST_AXES = 16;
constexpr int64_t MOST_THREADS = 1024;
enum Presence { REQUIRED, OPTIONAL };  // of an input

struct Pool {
  const ort::Api& api;
  ort::KernelContext* context;
  ort::Status* status;
};

inline void parallel(void* with, void (*task)(void*, size_t), size_t count, void* data) {
  Pool& pool = *(Pool*)with;
  if (ort::Status* status = pool.api.parallel_for(pool.context, task, count, 0, data)) {
    if (pool.status) pool.api.release_status(pool.status);
    pool.status = status;
  }
}

// The tensor's shape; its rank is 1 to 16, or less where less is allowed.
inline ort::Status* shape_of(const ort::Api& api, const ort::Value* value, int64_t* dims, size_t* rank, size_t most = MOST_AXES) {
  ort::TensorInfo* shape = nullptr;
  RETURN_IF_WRONG(api.tensor_info(value, &shape));
  ort::Status* status = api.dimensions_count(shape, rank);
  if (!status && *rank >= 1 && *rank <= most) status = api.dimensions(shape, dims, *rank);
  api.release_tensor_info(shape);
  if (status) return status;
  return *rank >= 1 && *rank <= most ? nullptr : api.create_status(ort::INVALID_ARGUMENT, "a kernel takes 1 to 16 axes");
}

// An operator of float tensors whose kernels are `K`s made by `create`; what differs is set by the caller.
template <class K>
ort::CustomOp operation(const char* name, decltype(ort::CustomOp::create_kernel_v2) create, decltype(ort::CustomOp::compute_v2) compute) {
  static const char* const called = name;
  ort::CustomOp op{};
  op.version = ort::API_VERSION;
  op.name = [](const ort::CustomOp*) { return called; };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.input_type = op.output_type = [](const ort::CustomOp*, size_t) -> int { return ort::FLOAT; };
  op.destroy = [](void* kernel) { delete (K*)kernel; };
  op.output_kind = [](const ort::CustomOp*, size_t) -> int { return REQUIRED; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.variadic_input_least = op.variadic_input_alike = op.variadic_output_least = op.variadic_output_alike = [](const ort::CustomOp*) { return 1; };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  op.first_version = [](const ort::CustomOp*) { return 1; };
  op.last_version = [](const ort::CustomOp*) { return INT32_MAX; };
  return op;
}

// Whole numbers of a node by name, and the scale of a Recurrence or an Attention, which a node holds as a double's bits.
struct Field {
  const char* name;
  int64_t* to;
};
inline ort::Status* read(const ort::Api& api, const ort::KernelInfo* info, std::initializer_list<Field> fields, double* scale) {
  int64_t bits = 0;
  for (const Field& field : fields) RETURN_IF_WRONG(api.attribute(info, field.name, field.to));
  RETURN_IF_WRONG(api.attribute(info, "scale", &bits));
  std::memcpy(scale, &bits, 8);
  return nullptr;
}

ort::CustomOp attention_op();
ort::CustomOp recurrence_op();

}  // namespace structured
