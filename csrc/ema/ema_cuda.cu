// The boundary of ema_update_, adamw_ema_ and grad_norm on the GPU: checks, then tables of tensors for the kernels.
#include "../launch.cuh"
#include "ema_kernel.cuh"
#include "lists.h"

namespace atst {
namespace {

using ema::AdamWEntry;
using ema::AdamWTable;
using ema::EmaEntry;
using ema::EmaTable;
using ema::NormEntry;
using ema::NormTable;
using ema::Number;
using ema::TensorList;
using ema::Type;

struct OnFirstDevice {
  const char *op, *first_name;
  int32_t device;

  OnFirstDevice(const char* op, const char* first_name, const Tensor& first)
      : op(op), first_name(first_name), device(first.get_device_index()) {
    ATST_CHECK(on_device(first), op, ": ", first_name, "[0] must be on a CUDA device");
  }
  void operator()(const Tensor& t, const char* name, size_t i) const {
    ATST_CHECK(on_device(t) && t.get_device_index() == device, op, ": ", name, "[", i, "] must be on CUDA device ",
               device, ", as ", first_name, "[0] is");
  }
};

// A number on the device of the call, or the value of one on the CPU.
Number number(const Call& call, const Tensor& t, const char* name) {
  ATST_CHECK(t.numel() == 1, call.op, ": ", name, " must be a tensor of one value");
  if (!on_device(t) && t.is_cpu()) return {nullptr, ema::read_value(t, call.op, name), true};
  call.same_device(t, name);
  const bool wide = t.scalar_type() == ScalarType::Double;
  ATST_CHECK(wide || t.scalar_type() == ScalarType::Float, call.op, ": ", name, " must be float32 or float64");
  return {wide ? static_cast<const void*>(call.in<double>(t)) : call.in<float>(t), 0, wide};
}

Number momentum_number(const Call& call, const Tensor& momentum) {
  const Number m = number(call, momentum, "momentum");
  if (!m.address) ema::check_momentum(m.value, call.op);
  return m;
}

// Whether four elements of `size` bytes can be accessed together at every pointer (null: nothing is).
bool aligned(size_t size, std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % (4 * size) == 0;
}

unsigned chunks(int64_t n, int chunk) { return static_cast<unsigned>((n + chunk - 1) / chunk); }

// launch(table, blocks, number of the launch) for tables that together hold all entries, in order.
template <class Table, class Entry, class Launch>
void launch_tables(Table& table, std::vector<Entry>& entries, int chunk, const Launch& launch) {
  for (size_t begin = 0, index = 0; begin < entries.size(); begin += Table::kEntries, ++index) {
    table.count = static_cast<int>(std::min<size_t>(Table::kEntries, entries.size() - begin));
    unsigned blocks = 0;
    for (int i = 0; i < table.count; ++i) {
      Entry& entry = table.entries[i] = entries[begin + i];
      entry.first = blocks;
      blocks += chunks(entry.n, chunk);
    }
    launch(blocks, index);
  }
}

void ema_update_(TensorList teacher, TensorList student, Tensor momentum) {
  const char* op = "ema_update_";
  ema::check_length(student, teacher, op, "student", "teacher");
  if (teacher.empty()) return;
  const OnFirstDevice place(op, "teacher", teacher[0]);
  const Call call(op, teacher[0]);
  EmaTable table;
  table.momentum = momentum_number(call, momentum);
  std::vector<EmaEntry> entries;
  for (size_t i = 0; i < teacher.size(); ++i) {
    const Tensor &t = teacher[i], &s = student[i];
    const Type type = ema::check_pair(t, s, op, i, place);
    if (t.numel() == 0) continue;
    float* to = call.inout<float>(t);
    const void* from = call.in<void>(s);
    const bool vectors = aligned(4, {to}) && aligned(ema::size_of(type), {from});
    entries.push_back({to, from, t.numel(), 0, type, vectors});
  }
  launch_tables(table, entries, ema::kChunk, [&](unsigned blocks, size_t) {
    call.launch(ema::ema_kernel, dim3(blocks), dim3(ema::kThreads), 0, table);
  });
}

AdamWEntry adamw_entry(const Call& call, const ema::AdamWTensors& t) {
  const auto inout = [&call](const Tensor* x) { return x && x->numel() ? call.inout<float>(*x) : nullptr; };
  const auto out = [&call](const Tensor* x) { return x ? call.out<uint16_t>(*x) : nullptr; };
  AdamWEntry e{};
  e.param = t.step ? inout(t.param) : const_cast<float*>(call.in<float>(*t.param));
  e.exp_avg = inout(t.exp_avg);
  e.exp_avg_sq = inout(t.exp_avg_sq);
  e.step = inout(t.step);
  e.teacher = inout(t.teacher);
  e.grad = t.grad ? call.in<void>(*t.grad) : nullptr;
  e.student_shadow = out(t.student_shadow);
  e.teacher_shadow = out(t.teacher_shadow);
  e.n = t.param->numel();
  e.group = static_cast<unsigned>(t.group);
  e.bf16_grad = t.grad_type == Type::bf16;
  e.vectors = aligned(4, {e.param, e.exp_avg, e.exp_avg_sq, e.teacher}) && aligned(e.bf16_grad ? 2 : 4, {e.grad}) &&
              aligned(2, {e.student_shadow, e.teacher_shadow});
  return e;
}

void adamw_ema_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                TensorList teachers, TensorList student_shadows, TensorList teacher_shadows, Tensor hyper,
                std::vector<int64_t> group_sizes, Tensor momentum, std::optional<Tensor> grad_scale, bool hf) {
  const char* op = "adamw_ema_";
  if (params.empty()) return;
  const OnFirstDevice place(op, "params", params[0]);
  const auto all =
      ema::adamw_tensors({params, grads, exp_avgs, exp_avg_sqs, steps, teachers, student_shadows, teacher_shadows},
                         hyper, group_sizes, place);
  const Call call(op, params[0]);
  call.same_device(hyper, "hyper");
  AdamWTable table;
  table.hyper = call.in<double>(hyper);
  table.momentum = momentum_number(call, momentum);
  table.grad_scale = grad_scale ? number(call, *grad_scale, "grad_scale") : Number{nullptr, 1, true};
  table.hf = hf;
  std::vector<AdamWEntry> entries;
  for (const ema::AdamWTensors& t : all)
    if (t.step || (!t.idle() && t.param->numel())) entries.push_back(adamw_entry(call, t));
  if (entries.empty()) return;
  const int64_t launches = (static_cast<int64_t>(entries.size()) + AdamWTable::kEntries - 1) / AdamWTable::kEntries;
  const Tensor started = torch::stable::new_empty(params[0], {launches}, ScalarType::Int);
  auto* counters = call.scratch<unsigned>(started);
  call.zero(counters, launches * sizeof(unsigned));
  launch_tables(table, entries, ema::kChunk, [&](unsigned blocks, size_t index) {
    table.started = counters + index;
    // a block at least: parameters without elements have steps to count as well
    call.launch(ema::adamw_kernel, dim3(std::max(blocks, 1u)), dim3(ema::kThreads), sizeof(ema::AdamWShared), table);
  });
}

Tensor grad_norm(TensorList grads) {
  const char* op = "grad_norm";
  ATST_CHECK(!grads.empty(), op, ": grads must not be empty");
  const OnFirstDevice place(op, "grads", grads[0]);
  const Call call(op, grads[0]);
  std::vector<NormEntry> entries;
  int64_t total = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Type type = ema::check_grad(grads[i], op, i, place);
    const int64_t n = grads[i].numel();
    if (n == 0) continue;
    const void* x = call.in<void>(grads[i]);
    entries.push_back({x, n, 0, type, aligned(ema::size_of(type), {x})});
    total += chunks(n, ema::kNormChunk);
  }
  const Tensor norm = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
  if (entries.empty()) {
    call.zero(call.out<double>(norm), sizeof(double));
    return norm;
  }
  // the sums, and one more place for the counter
  const Tensor sums = torch::stable::new_empty(grads[0], {total + 1}, ScalarType::Double);
  NormTable table;
  table.sums = call.scratch<double>(sums);
  table.norm = call.out<double>(norm);
  table.finished = reinterpret_cast<unsigned*>(table.sums + total);
  call.zero(table.finished, sizeof(unsigned));
  const size_t last = (entries.size() - 1) / NormTable::kEntries;
  launch_tables(table, entries, ema::kNormChunk, [&](unsigned blocks, size_t index) {
    table.total = index == last ? total : 0;
    call.launch(ema::norm_kernel, dim3(blocks), dim3(ema::kThreads), (ema::kThreads + 1) * sizeof(double), table);
    table.sums += blocks;
  });
  return norm;
}

}  // namespace
}  // namespace atst

ATST_CUDA_IMPL(m) {
  m.impl("ema_update_", TORCH_BOX(&atst::ema_update_));
  m.impl("adamw_ema_", TORCH_BOX(&atst::adamw_ema_));
  m.impl("grad_norm", TORCH_BOX(&atst::grad_norm));
}
