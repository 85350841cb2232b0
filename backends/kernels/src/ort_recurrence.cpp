// structured.kernels::Recurrence(sequences.., [state], [rates]) -> (output, state) for ONNX Runtime.
#include <new>

#include "ort_op.hpp"
#include "recurrence.hpp"

namespace structured {
namespace {

struct RecurrenceKernel {
  const ort::Api& api;
  int64_t threads;
  Recurrence of;
};

ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** out) {
  Recurrence of{};
  int64_t threads = 1;
  RETURN_IF_WRONG(read(*api, info,
                       {{"kind", &of.kind}, {"heads", &of.heads}, {"key", &of.key}, {"width", &of.width}, {"queries", &of.queries},
                        {"keys", &of.keys}, {"factors", &of.factors}, {"delta", &of.delta}, {"decay", &of.decay},
                        {"stored", &of.stored}, {"read", &of.read}, {"carried", &of.carried}, {"threads", &threads}},
                       &of.scale));
  if (!of.sound()) return api->create_status(ort::INVALID_ARGUMENT, "sizes of a Recurrence that do not fit together");
  *out = new RecurrenceKernel{*api, std::clamp<int64_t>(threads, 1, MOST_THREADS), of};
  return nullptr;
}

ort::Status* compute(void* self, ort::KernelContext* context) {
  const RecurrenceKernel& kernel = *(const RecurrenceKernel*)self;
  const ort::Api& api = kernel.api;
  const Recurrence& of = kernel.of;
  Recurrence::Input wanted[MOST_INPUTS];
  const int count = of.inputs(wanted);
  size_t given = 0;
  RETURN_IF_WRONG(api.input_count(context, &given));
  if (given < (size_t)count) return api.create_status(ort::INVALID_ARGUMENT, "a Recurrence lacks inputs");
  const float* in[MOST_INPUTS] = {};
  int64_t dims[MOST_AXES], batch = 0, time = 0;
  size_t rank = 0;
  for (int i = 0; i < count; ++i) {
    const ort::Value* value = nullptr;
    RETURN_IF_WRONG(api.input(context, i, &value));
    if (!value) return api.create_status(ort::INVALID_ARGUMENT, "a Recurrence lacks an input");
    RETURN_IF_WRONG(shape_of(api, value, dims, &rank));
    if (i == 0 && rank == 3) batch = dims[0], time = dims[1];
    int64_t numbers = 1;
    for (size_t axis = wanted[i].once ? 0 : wanted[i].sequence ? 2 : 1; axis < rank; ++axis) numbers *= dims[axis];
    bool fits = numbers == wanted[i].numbers && (wanted[i].once || dims[0] == batch);
    if (wanted[i].sequence) fits = fits && rank == 3 && dims[1] == time;
    if (!fits) return api.create_status(ort::INVALID_ARGUMENT, "an input of a Recurrence has another shape than its sizes say");
    void* data = nullptr;
    RETURN_IF_WRONG(api.tensor_data(value, &data));
    in[i] = (const float*)data;
  }
  const int64_t output[] = {batch, time, of.outputs()};
  const int64_t entries[] = {batch, of.state()}, matrices[] = {batch, of.heads, of.key, of.width};
  ort::Value* made[2] = {};
  RETURN_IF_WRONG(api.output(context, 0, output, 3, &made[0]));
  RETURN_IF_WRONG(api.output(context, 1, of.kind == ENTRIES ? entries : matrices, of.kind == ENTRIES ? 2 : 4, &made[1]));
  void* out[2] = {};
  for (int i = 0; i < 2; ++i) RETURN_IF_WRONG(api.tensor_data(made[i], &out[i]));
  float* const to[2] = {(float*)out[0], (float*)out[1]};
  Pool pool{api, context, nullptr};
  run(of, in, to, batch, time, Threads{(int)kernel.threads, parallel, &pool});
  return pool.status;
}

}  // namespace

ort::CustomOp recurrence_op() {
  ort::CustomOp op = operation<RecurrenceKernel>("Recurrence", create, compute);
  op.input_count = [](const ort::CustomOp*) -> size_t { return MOST_INPUTS; };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 2; };
  op.input_kind = [](const ort::CustomOp*, size_t i) -> int { return i < 2 ? REQUIRED : OPTIONAL; };
  return op;
}

}  // namespace structured
