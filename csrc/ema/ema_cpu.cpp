// The boundary of ema_update_, adamw_ema_ and grad_norm: checks, then pieces of all tensors shared out among the
// threads.
#include <atomic>
#include <cmath>

#include "../check.h"
#include "ema.h"
#include "lists.h"

namespace atst {
namespace {

using ema::AdamWItem;
using ema::EmaItem;
using ema::TensorList;
using ema::Type;

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

struct OnCpu {
  const char* op;
  void operator()(const Tensor& t, const char* name, size_t i) const {
    ATST_CHECK(t.is_cpu(), op, ": ", name, "[", i, "] must be on the CPU");
  }
};

double value_of(const Tensor& t, const char* op, const char* name) {
  ATST_CHECK(t.is_cpu() && t.numel() == 1, op, ": ", name, " must be a tensor of one value on the CPU");
  return ema::read_value(t, op, name);
}

double momentum_of(const Tensor& t, const char* op) {
  const double m = value_of(t, op, "momentum");
  ema::check_momentum(m, op);
  return m;
}

void ema_update_(TensorList teacher, TensorList student, Tensor momentum) {
  const char* op = "ema_update_";
  ema::check_length(student, teacher, op, "student", "teacher");
  const double m = momentum_of(momentum, op);
  std::vector<EmaItem> items;
  int64_t elements = 0;
  for (size_t i = 0; i < teacher.size(); ++i) {
    const Tensor &t = teacher[i], &s = student[i];
    const Type type = ema::check_pair(t, s, op, i, OnCpu{op});
    elements += t.numel();
    auto* to = static_cast<float*>(t.mutable_data_ptr());
    const auto* from = static_cast<const char*>(s.const_data_ptr());
    for (int64_t o = 0, n = t.numel(); o < n; o += kPiece)
      items.push_back({to + o, from + o * ema::size_of(type), std::min(kPiece, n - o), type});
  }
  const auto run = ATST_SELECT_SIMD(ema_update);
  for_each_item(items, elements, [&](int64_t, const EmaItem& item) { run(item, static_cast<float>(1 - m)); });
}

void check_hyper(const Tensor& hyper, const char* op) {
  ATST_CHECK(hyper.is_cpu(), op, ": hyper must be on the CPU");
  static const char* names[ema::kHyper] = {"lr", "weight_decay", "beta1", "beta2", "eps"};
  const auto* h = static_cast<const double*>(hyper.const_data_ptr());
  for (int64_t group = 0; group < hyper.numel() / ema::kHyper; ++group, h += ema::kHyper) {
    const int i = ema::first_invalid(h);
    ATST_CHECK(i == ema::kHyper, op, ": ", names[i], " of group ", group, " must be 0 or more",
               i == 2 || i == 3 ? " and less than 1" : " and finite", ", got ", h[i]);
  }
}

template <class T>
T* data(const Tensor* t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

void adamw_ema_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList steps,
                TensorList teachers, TensorList student_shadows, TensorList teacher_shadows, Tensor hyper,
                std::vector<int64_t> group_sizes, Tensor momentum, std::optional<Tensor> grad_scale, bool hf) {
  const char* op = "adamw_ema_";
  const auto all =
      ema::adamw_tensors({params, grads, exp_avgs, exp_avg_sqs, steps, teachers, student_shadows, teacher_shadows},
                         hyper, group_sizes, OnCpu{op});
  check_hyper(hyper, op);
  const double m = momentum_of(momentum, op);
  const double scale = grad_scale ? value_of(*grad_scale, op, "grad_scale") : 1.0;
  const auto* group_hyper = static_cast<const double*>(hyper.const_data_ptr());
  std::vector<AdamWItem> items;
  int64_t elements = 0;
  for (const ema::AdamWTensors& t : all) {
    elements += t.param->numel();
    if (t.idle()) continue;
    AdamWItem a{data<float>(t.param),
                data<float>(t.exp_avg),
                data<float>(t.exp_avg_sq),
                data<float>(t.teacher),
                t.grad ? t.grad->const_data_ptr() : nullptr,
                data<uint16_t>(t.student_shadow),
                data<uint16_t>(t.teacher_shadow),
                0,
                t.grad_type,
                {}};
    if (t.step) a.step = ema::step_of(group_hyper + ema::kHyper * t.group, *data<float>(t.step) + 1.0, hf);
    for (int64_t o = 0, n = t.param->numel(); o < n; o += kPiece) {
      const auto at = [o](auto* base) { return base ? base + o : nullptr; };
      const void* grad = a.grad ? static_cast<const char*>(a.grad) + o * ema::size_of(a.grad_type) : nullptr;
      items.push_back({at(a.param), at(a.exp_avg), at(a.exp_avg_sq), at(a.teacher), grad, at(a.student_shadow),
                       at(a.teacher_shadow), std::min(kPiece, n - o), a.grad_type, a.step});
    }
  }
  for (const ema::AdamWTensors& t : all)
    if (t.step) ++*data<float>(t.step);
  const auto run = ATST_SELECT_SIMD(adamw_ema);
  for_each_item(items, elements, [&](int64_t, const AdamWItem& item) {
    run(item, static_cast<float>(scale), static_cast<float>(1 - m), elements > kCached);
  });
}

struct Span {
  const void* x;
  int64_t n;
  Type type;
};

Tensor grad_norm(TensorList grads) {
  const char* op = "grad_norm";
  std::vector<Span> spans;
  int64_t elements = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Type type = ema::check_grad(grads[i], op, i, OnCpu{op});
    const auto* x = static_cast<const char*>(grads[i].const_data_ptr());
    elements += grads[i].numel();
    for (int64_t o = 0, n = grads[i].numel(); o < n; o += kPiece)
      spans.push_back({x + o * ema::size_of(type), std::min(kPiece, n - o), type});
  }
  std::vector<double> sums(spans.size());
  const auto run = ATST_SELECT_SIMD(sum_of_squares);
  for_each_item(spans, elements, [&](int64_t i, const Span& span) { sums[i] = run(span.x, span.n, span.type); });
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
