// structured.kernels::Chain(x, packed[, skip[, shape]]) for ONNX Runtime: one node runs a packed chain on the session's own threads.
#include <cstdlib>
#include <new>

#include "ort_op.hpp"

using namespace structured;

namespace {

const char* const DOMAIN = "structured.kernels";

struct Kernel {
  const ort::Api& api;
  int64_t threads;
  bool zeros;  // a 0 in a shape is meant
  const void* packed;  // the session's own bytes, or a copy where they are not aligned
  void* copy;
  ~Kernel() { std::free(copy); }
};

ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** out) {
  int64_t threads = 1, bytes = 0, zeros = 0;
  RETURN_IF_WRONG(api->attribute(info, "threads", &threads));
  RETURN_IF_WRONG(api->attribute(info, "allowzero", &zeros));
  RETURN_IF_WRONG(api->attribute(info, "bytes", &bytes));
  int is_constant = 0;
  const ort::Value* value = nullptr;
  RETURN_IF_WRONG(api->constant_input(info, 1, &is_constant, &value));
  if (!is_constant || !value) return api->create_status(ort::INVALID_ARGUMENT, "the weights of a Chain have to be an initializer");
  ort::TensorInfo* shape = nullptr;
  size_t held = 0;
  RETURN_IF_WRONG(api->tensor_info(value, &shape));
  ort::Status* status = api->element_count(shape, &held);
  api->release_tensor_info(shape);
  if (status) return status;
  if (bytes < 0 || (size_t)bytes != held) return api->create_status(ort::INVALID_ARGUMENT, "the weights of a Chain have another size than it says");
  void* data = nullptr;
  RETURN_IF_WRONG(api->tensor_data(value, &data));
  void* copy = nullptr;
  if ((uintptr_t)data % 64) {
    copy = std::aligned_alloc(64, round_up(bytes, 64));
    if (!copy) return api->create_status(ort::FAIL, "no memory for the weights of a Chain");
    std::memcpy(copy, data, bytes);
    data = copy;
  }
  if (const char* wrong = bytes < (int64_t)sizeof(Header) ? "this is no packed chain" : Chain(data).wrong(bytes)) {
    std::free(copy);
    return api->create_status(ort::INVALID_ARGUMENT, wrong);
  }
  *out = new Kernel{*api, std::clamp<int64_t>(threads, 1, MOST_THREADS), zeros != 0, data, copy};
  return nullptr;
}

// The output's shape as a Reshape has it: -1 is what is left, 0 stays as it is unless zeros are meant.
ort::Status* reshape(const ort::Api& api, const ort::Value* wanted, bool zeros, int64_t* dims, size_t* rank) {
  int64_t axes = 0, asked[MOST_AXES], known = 1, count = 1, open = -1;
  size_t one = 0;
  void* data = nullptr;
  RETURN_IF_WRONG(shape_of(api, wanted, &axes, &one, 1));
  if (axes < 1 || axes > (int64_t)MOST_AXES) return api.create_status(ort::INVALID_ARGUMENT, "a kernel takes 1 to 16 axes");
  RETURN_IF_WRONG(api.tensor_data(wanted, &data));
  std::memcpy(asked, data, axes * sizeof *asked);
  for (size_t i = 0; i < *rank; ++i) count *= dims[i];
  for (int64_t i = 0; i < axes; ++i) {
    if (asked[i] == 0 && !zeros && i < (int64_t)*rank) asked[i] = dims[i];
    const bool fits = asked[i] >= 0 ? !__builtin_mul_overflow(known, asked[i], &known) : asked[i] == -1 && open < 0;
    if (!fits) return api.create_status(ort::INVALID_ARGUMENT, "no output of a Chain has such a shape");
    if (asked[i] < 0) open = i;
  }
  if (open >= 0 && known > 0) asked[open] = count / known, known *= asked[open];
  if (known != count || asked[axes - 1] != dims[*rank - 1] || (open >= 0 && asked[open] < 0))
    return api.create_status(ort::INVALID_ARGUMENT, "the output of a Chain does not fit the shape that it is to have");
  std::memcpy(dims, asked, axes * sizeof *asked);
  *rank = (size_t)axes;
  return nullptr;
}

ort::Status* compute(void* self, ort::KernelContext* context) {
  const Kernel& kernel = *(const Kernel*)self;
  const ort::Api& api = kernel.api;
  const Chain chain(kernel.packed);
  const ort::Value *input = nullptr, *beside = nullptr, *wanted = nullptr;
  int64_t dims[MOST_AXES], others[MOST_AXES];
  size_t rank = 0, count = 0, other = 0;
  RETURN_IF_WRONG(api.input_count(context, &count));
  RETURN_IF_WRONG(api.input(context, 0, &input));
  RETURN_IF_WRONG(shape_of(api, input, dims, &rank));
  if (dims[rank - 1] != chain.head.n) return api.create_status(ort::INVALID_ARGUMENT, "the input of a Chain has another width than its weights");
  size_t rows = 1;
  for (size_t i = 0; i + 1 < rank; ++i) rows *= (size_t)dims[i];
  dims[rank - 1] = chain.head.m;
  if (count > 3) RETURN_IF_WRONG(api.input(context, 3, &wanted));
  if (wanted) RETURN_IF_WRONG(reshape(api, wanted, kernel.zeros, dims, &rank));
  void *x = nullptr, *y = nullptr, *skip = nullptr;
  if (chain.skips()) {
    if (count > 2) RETURN_IF_WRONG(api.input(context, 2, &beside));
    if (!beside) return api.create_status(ort::INVALID_ARGUMENT, "a Chain lacks what it adds");
    RETURN_IF_WRONG(shape_of(api, beside, others, &other));
    if (other != rank || std::memcmp(dims, others, rank * sizeof *dims))
      return api.create_status(ort::INVALID_ARGUMENT, "what a Chain adds has another shape than its output");
    RETURN_IF_WRONG(api.tensor_data(beside, &skip));
  }
  ort::Value* output = nullptr;
  RETURN_IF_WRONG(api.output(context, 0, dims, rank, &output));
  if (!rows) return nullptr;
  RETURN_IF_WRONG(api.tensor_data(input, &x));
  RETURN_IF_WRONG(api.tensor_data(output, &y));
  Pool pool{api, context, nullptr};
  try {
    run(chain, (const float*)x, (const float*)skip, (float*)y, rows, Threads{(int)kernel.threads, parallel, &pool});
  } catch (const std::bad_alloc&) {
    return api.create_status(ort::FAIL, "no memory for a Chain");
  }
  return pool.status;
}

ort::CustomOp chain_op() {
  ort::CustomOp op = operation<Kernel>("Chain", create, compute);
  op.input_type = [](const ort::CustomOp*, size_t i) -> int { return i == 1 ? ort::UINT8 : i == 3 ? ort::INT64 : ort::FLOAT; };
  op.input_count = [](const ort::CustomOp*) -> size_t { return 4; };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op.input_kind = [](const ort::CustomOp*, size_t i) -> int { return i > 1 ? OPTIONAL : REQUIRED; };
  return op;
}

}  // namespace

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Api* api = base->get_api(ort::API_VERSION);
  if (!api) return nullptr;  // an ONNX Runtime before 1.17: who loads the library has asked for its version first
  static const ort::CustomOp operators[] = {chain_op(), recurrence_op(), attention_op()};
  ort::CustomOpDomain* domain = nullptr;
  RETURN_IF_WRONG(api->create_domain(DOMAIN, &domain));
  for (const ort::CustomOp& op : operators) RETURN_IF_WRONG(api->add_to_domain(domain, &op));
  return api->add_domain(options, domain);
}
