// structured.kernels::Attention(query, key, value, [mask]) -> output for ONNX Runtime; the mask is added, 1 where it is the same for all.
#include <new>

#include "attention.hpp"
#include "ort_op.hpp"

namespace structured {
namespace {

constexpr size_t AXES = 4;

struct AttentionKernel {
  const ort::Api& api;
  int64_t threads;
  Attention of;
};

ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** out) {
  Attention of{};
  int64_t threads = 1;
  RETURN_IF_WRONG(read(*api, info,
                       {{"heads", &of.heads}, {"shared", &of.shared}, {"key", &of.key}, {"width", &of.width}, {"causal", &of.causal},
                        {"zero", &of.zero}, {"turned", &of.turned}, {"threads", &threads}},
                       &of.scale));
  if (!of.sound()) return api->create_status(ort::INVALID_ARGUMENT, "sizes of an Attention that do not fit together");
  *out = new AttentionKernel{*api, std::clamp<int64_t>(threads, 1, MOST_THREADS), of};
  return nullptr;
}

// The four axes and the numbers of an input; nullptr where it is not given.
ort::Status* given_at(const ort::Api& api, ort::KernelContext* context, size_t i, int64_t (&dims)[MOST_AXES], const float** data) {
  const ort::Value* value = nullptr;
  RETURN_IF_WRONG(api.input(context, i, &value));
  *data = nullptr;
  if (!value) return nullptr;
  size_t rank = 0;
  RETURN_IF_WRONG(shape_of(api, value, dims, &rank));
  if (rank != AXES) return api.create_status(ort::INVALID_ARGUMENT, "an input of an Attention has other than four axes");
  void* numbers = nullptr;
  RETURN_IF_WRONG(api.tensor_data(value, &numbers));
  *data = (const float*)numbers;
  return nullptr;
}

ort::Status* compute(void* self, ort::KernelContext* context) {
  const AttentionKernel& kernel = *(const AttentionKernel*)self;
  const ort::Api& api = kernel.api;
  const Attention& of = kernel.of;
  Attended given{};
  size_t count = 0;
  RETURN_IF_WRONG(api.input_count(context, &count));
  if (count < 3) return api.create_status(ort::INVALID_ARGUMENT, "an Attention lacks inputs");
  const float** const to[] = {&given.query, &given.key, &given.value};
  int64_t dims[MOST_AXES];
  for (int i = 0; i < 3; ++i) {
    RETURN_IF_WRONG(given_at(api, context, i, dims, to[i]));
    if (!*to[i]) return api.create_status(ort::INVALID_ARGUMENT, "an Attention lacks an input");
    const int64_t heads = dims[of.is_turned(i) ? 2 : 1], time = dims[of.is_turned(i) ? 1 : 2];
    if (i == 0) given.batch = dims[0], given.time = time;
    if (i == 1) given.keys = time;
    const bool fits = dims[0] == given.batch && heads == of.heads_of(i) && dims[3] == of.width_of(i) && (i < 2 || time == given.keys);
    if (!fits) return api.create_status(ort::INVALID_ARGUMENT, "an input of an Attention has another shape than its sizes say");
  }
  if (count > 3) RETURN_IF_WRONG(given_at(api, context, 3, dims, &given.mask));
  if (given.mask) {
    const int64_t whole[] = {given.batch, of.heads, given.time, given.keys};
    int64_t stride = 1;
    for (int axis = AXES - 1; axis >= 0; --axis) {
      const bool fits = dims[axis] == whole[axis] || dims[axis] == 1;
      if (!fits) return api.create_status(ort::INVALID_ARGUMENT, "the mask of an Attention has another shape");
      given.mask_strides[axis] = dims[axis] == 1 ? 0 : stride;
      stride *= dims[axis];
    }
  }
  const bool turned = of.is_turned(OUTPUT);
  const int64_t shape[] = {given.batch, turned ? given.time : of.heads, turned ? of.heads : given.time, of.width};
  ort::Value* made = nullptr;
  void* out = nullptr;
  RETURN_IF_WRONG(api.output(context, 0, shape, AXES, &made));
  RETURN_IF_WRONG(api.tensor_data(made, &out));
  given.output = (float*)out;
  Pool pool{api, context, nullptr};
  try {
    run(of, given, Threads{(int)kernel.threads, parallel, &pool});
  } catch (const std::bad_alloc&) {
    return api.create_status(ort::FAIL, "no memory for an Attention");
  }
  return pool.status;
}

}  // namespace

ort::CustomOp attention_op() {
  ort::CustomOp op = operation<AttentionKernel>("Attention", create, compute);
  op.input_count = [](const ort::CustomOp*) -> size_t { return AXES; };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op.input_kind = [](const ort::CustomOp*, size_t i) -> int { return i < 3 ? REQUIRED : OPTIONAL; };
  return op;
}

}  // namespace structured
