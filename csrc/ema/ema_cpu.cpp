// The boundary of ema_update_, adamw_ema_ and grad_norm: checks, then pieces of all tensors shared out among the
// threads.
#include <atomic>
#include <cmath>

#include "../check.h"
#include "ema.h"

namespace atst {
namespace {

using ema::AdamWItem;
using ema::AdamWStep;
using ema::EmaItem;
using ema::Type;
using TensorList = std::vector<Tensor>;

// Elements per piece of work: small against the whole so that threads end together, large against a piece's set-up.
// Pieces do not depend on the number of threads, so neither do the bits.
constexpr int64_t kPiece = 1 << 16;

// With more parameters than this the shadows are written past the caches: nobody would find them there.
constexpr int64_t kCached = 1 << 22;

// Fewer elements than this are done before other threads have woken up.
constexpr int64_t kSerial = 1 << 15;

// run(i, items[i]) for every item, each thread taking the next one that is free.
template <class Item, class Run>
void for_each_item(const std::vector<Item>& items, int64_t elements, const Run& run) {
  std::atomic<int64_t> next{0};
  const auto size = static_cast<int64_t>(items.size());
  const int64_t threads = elements < kSerial ? 1 : std::min<int64_t>(size, torch::stable::get_num_threads());
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < size;) run(i, items[i]);
  });
}

void check_entry(const Tensor& t, const char* op, const char* name, size_t i) {
  ATST_CHECK(t.is_cpu(), op, ": ", name, "[", i, "] must be on the CPU");
  ATST_CHECK(t.is_contiguous(), op, ": ", name, "[", i, "] must be contiguous");
}

void check_float(const Tensor& t, const char* op, const char* name, size_t i) {
  ATST_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, "[", i, "] must be float32");
}

// `optional`: no tensors at all will do as well.
void check_length(const TensorList& list, const TensorList& first, const char* op, const char* name,
                  const char* first_name, bool optional = false) {
  ATST_CHECK(list.size() == first.size() || (optional && list.empty()), op, ": ", name,
             " must have as many tensors as ", first_name, " (", first.size(), "), got ", list.size());
}

// A CPU tensor of one float32 or float64 value.
double value_of(const Tensor& t, const char* op, const char* name) {
  ATST_CHECK(t.is_cpu() && t.numel() == 1, op, ": ", name, " must be a tensor of one value on the CPU");
  if (t.scalar_type() == ScalarType::Double) return *static_cast<const double*>(t.const_data_ptr());
  ATST_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32 or float64");
  return *static_cast<const float*>(t.const_data_ptr());
}

double momentum_of(const Tensor& t, const char* op) {
  const double m = value_of(t, op, "momentum");
  ATST_CHECK(m >= 0 && m <= 1, op, ": momentum must be between 0 and 1, got ", m);
  return m;
}

Type type_of(const Tensor& t, const char* op, size_t i) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      ATST_CHECK(false, op, ": student[", i, "] must be float32, bfloat16 or float16");
  }
}

void ema_update_(TensorList teacher, TensorList student, Tensor momentum) {
  const char* op = "ema_update_";
  check_length(student, teacher, op, "student", "teacher");
  const double m = momentum_of(momentum, op);
  std::vector<EmaItem> items;
  int64_t elements = 0;
  for (size_t i = 0; i < teacher.size(); ++i) {
    const Tensor &t = teacher[i], &s = student[i];
    check_entry(t, op, "teacher", i);
    check_entry(s, op, "student", i);
    check_float(t, op, "teacher", i);
    ATST_CHECK(t.sizes().equals(s.sizes()), op, ": student[", i, "] must have the shape of teacher[", i, "]");
    const Type type = type_of(s, op, i);
    elements += t.numel();
    auto* to = static_cast<float*>(t.mutable_data_ptr());
    const auto* from = static_cast<const char*>(s.const_data_ptr());
    for (int64_t o = 0, n = t.numel(); o < n; o += kPiece)
      items.push_back({to + o, from + o * (type == Type::f32 ? 4 : 2), std::min(kPiece, n - o), type});
  }
  const auto run = ATST_SELECT_SIMD(ema_update);
  for_each_item(items, elements, [&](int64_t, const EmaItem& item) { run(item, static_cast<float>(1 - m)); });
}

// lr, weight_decay, beta1, beta2, eps of one group, at a parameter's t-th step.
AdamWStep step_of(const double* hyper, double t, bool hf) {
  const double lr = hyper[0], decay = hyper[1], beta1 = hyper[2], beta2 = hyper[3];
  const double correction1 = 1 - std::pow(beta1, t), correction2 = std::sqrt(1 - std::pow(beta2, t));
  const auto lr_decay = static_cast<float>(lr * decay);
  return {static_cast<float>(beta1),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(hf ? lr * correction2 / correction1 : lr / correction1),
          static_cast<float>(hf ? 1 : 1 / correction2),
          static_cast<float>(hyper[4]),
          hf ? 0 : lr_decay,
          hf ? lr_decay : 0};
}

void check_hyper(const Tensor& hyper, const std::vector<int64_t>& group_sizes, size_t params, const char* op) {
  ATST_CHECK(hyper.is_cpu() && hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous() &&
                 hyper.numel() == 5 * static_cast<int64_t>(group_sizes.size()),
             op, ": hyper must be float64 [groups, 5] on the CPU");
  int64_t sum = 0;
  for (int64_t size : group_sizes) sum += size;
  ATST_CHECK(sum == static_cast<int64_t>(params), op, ": group_sizes must add up to the number of params");
  static const char* names[5] = {"lr", "weight_decay", "beta1", "beta2", "eps"};
  const auto* h = static_cast<const double*>(hyper.const_data_ptr());
  for (size_t i = 0; i < 5 * group_sizes.size(); ++i) {
    const bool beta = i % 5 == 2 || i % 5 == 3;
    ATST_CHECK(h[i] >= 0 && std::isfinite(h[i]) && (!beta || h[i] < 1), op, ": ", names[i % 5], " of group ", i / 5,
               " must be 0 or more", beta ? " and less than 1" : " and finite", ", got ", h[i]);
  }
}

// Pointer to the elements of list[i], null where it has none; its shape must be that of the parameter.
template <class T>
T* entry(const TensorList& list, size_t i, const Tensor& param, ScalarType dtype, const char* name) {
  const char* op = "adamw_ema_";
  if (list.empty() || list[i].numel() == 0) return nullptr;
  const Tensor& t = list[i];
  check_entry(t, op, name, i);
  ATST_CHECK(t.scalar_type() == dtype, op, ": ", name, "[", i, "] has the wrong dtype");
  ATST_CHECK(t.sizes().equals(param.sizes()), op, ": ", name, "[", i, "] must have the shape of params[", i, "]");
  return static_cast<T*>(t.mutable_data_ptr());
}

void adamw_ema_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                TensorList teachers, TensorList student_shadows, TensorList teacher_shadows, Tensor hyper,
                std::vector<int64_t> group_sizes, Tensor momentum, std::optional<Tensor> grad_scale, bool hf) {
  const char* op = "adamw_ema_";
  const char* names[] = {"grads", "exp_avgs", "exp_avg_sqs", "steps", "teachers", "student_shadows", "teacher_shadows"};
  const TensorList* lists[] = {&grads, &exp_avgs, &exp_avg_sqs, &steps, &teachers, &student_shadows, &teacher_shadows};
  for (int i = 0; i < 7; ++i) check_length(*lists[i], params, op, names[i], "params", i >= 4);
  check_hyper(hyper, group_sizes, params.size(), op);
  const double m = momentum_of(momentum, op);
  const double scale = grad_scale ? value_of(*grad_scale, op, "grad_scale") : 1.0;
  const auto* group_hyper = static_cast<const double*>(hyper.const_data_ptr());
  std::vector<AdamWItem> items;
  std::vector<float*> counters;
  int64_t elements = 0;
  size_t group = 0, left = group_sizes.empty() ? 0 : group_sizes[0];
  for (size_t i = 0; i < params.size(); ++i, --left) {
    while (left == 0) left = group_sizes[++group];
    const Tensor& p = params[i];
    check_entry(p, op, "params", i);
    check_float(p, op, "params", i);
    elements += p.numel();
    AdamWItem a{};
    a.param = static_cast<float*>(p.mutable_data_ptr());
    a.teacher = entry<float>(teachers, i, p, ScalarType::Float, "teachers");
    a.student_shadow = entry<uint16_t>(student_shadows, i, p, ScalarType::BFloat16, "student_shadows");
    a.teacher_shadow = entry<uint16_t>(teacher_shadows, i, p, ScalarType::BFloat16, "teacher_shadows");
    ATST_CHECK(!a.teacher_shadow || a.teacher, op, ": teacher_shadows[", i, "] must come with a teacher");
    if (steps[i].numel() > 0) {
      const double t = value_of(steps[i], op, "steps") + 1;
      a.grad = entry<float>(grads, i, p, ScalarType::Float, "grads");
      a.exp_avg = entry<float>(exp_avgs, i, p, ScalarType::Float, "exp_avgs");
      a.exp_avg_sq = entry<float>(exp_avg_sqs, i, p, ScalarType::Float, "exp_avg_sqs");
      ATST_CHECK(p.numel() == 0 || (a.grad && a.exp_avg && a.exp_avg_sq), op, ": grads[", i, "], exp_avgs[", i,
                 "] and exp_avg_sqs[", i, "] must have the shape of params[", i, "] where steps[", i, "] is given");
      check_float(steps[i], op, "steps", i);
      a.step = step_of(group_hyper + 5 * group, t, hf);
      counters.push_back(static_cast<float*>(steps[i].mutable_data_ptr()));
    }
    if (!a.grad && !a.teacher && !a.student_shadow) continue;
    for (int64_t o = 0, n = p.numel(); o < n; o += kPiece) {
      const auto at = [o](auto* base) { return base ? base + o : nullptr; };
      items.push_back({at(a.param), at(a.exp_avg), at(a.exp_avg_sq), at(a.teacher), at(a.grad), at(a.student_shadow),
                       at(a.teacher_shadow), std::min(kPiece, n - o), a.step});
    }
  }
  for (float* counter : counters) ++*counter;
  const auto run = ATST_SELECT_SIMD(adamw_ema);
  for_each_item(items, elements, [&](int64_t, const AdamWItem& item) {
    run(item, static_cast<float>(scale), static_cast<float>(1 - m), elements > kCached);
  });
}

struct Span {
  const float* x;
  int64_t n;
};

Tensor grad_norm(TensorList grads) {
  const char* op = "grad_norm";
  std::vector<Span> spans;
  int64_t elements = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_entry(grads[i], op, "grads", i);
    check_float(grads[i], op, "grads", i);
    const auto* x = static_cast<const float*>(grads[i].const_data_ptr());
    elements += grads[i].numel();
    for (int64_t o = 0, n = grads[i].numel(); o < n; o += kPiece) spans.push_back({x + o, std::min(kPiece, n - o)});
  }
  std::vector<double> sums(spans.size());
  const auto run = ATST_SELECT_SIMD(sum_of_squares);
  for_each_item(spans, elements, [&](int64_t i, const Span& span) { sums[i] = run(span.x, span.n); });
  double sum = 0;
  for (double s : sums) sum += s;
  Tensor norm = torch::stable::empty({}, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(sum);
  return norm;
}

}  // namespace
}  // namespace atst

STABLE_TORCH_LIBRARY_IMPL(atst_fast, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&atst::ema_update_));
  m.impl("adamw_ema_", TORCH_BOX(&atst::adamw_ema_));
  m.impl("grad_norm", TORCH_BOX(&atst::grad_norm));
}
