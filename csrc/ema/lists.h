// The lists of tensors that ema_update_, adamw_ema_ and grad_norm take: the checks that the CPU and CUDA share.
#pragma once

#include "../check.h"
#include "adamw_step.h"
#include "types.h"

namespace atst::ema {

using TensorList = std::vector<Tensor>;

constexpr int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// `Place` is a callable (tensor, name, i) that fails where name[i] lies on the wrong device.
template <class Place>
void check_entry(const Tensor& t, const char* op, const char* name, size_t i, const Place& place) {
  place(t, name, i);
  ATST_CHECK(t.is_contiguous(), op, ": ", name, "[", i, "] must be contiguous");
}

inline void check_float(const Tensor& t, const char* op, const char* name, size_t i) {
  ATST_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, "[", i, "] must be float32");
}

// `optional`: no tensors at all will do as well.
inline void check_length(const TensorList& list, const TensorList& first, const char* op, const char* name,
                         const char* first_name, bool optional = false) {
  ATST_CHECK(list.size() == first.size() || (optional && list.empty()), op, ": ", name,
             " must have as many tensors as ", first_name, " (", first.size(), "), got ", list.size());
}

inline void check_momentum(double m, const char* op) {
  ATST_CHECK(m >= 0 && m <= 1, op, ": momentum must be between 0 and 1, got ", m);
}

// The float32 or float64 value behind a CPU pointer.
inline double read_value(const Tensor& t, const char* op, const char* name) {
  if (t.scalar_type() == ScalarType::Double) return *static_cast<const double*>(t.const_data_ptr());
  ATST_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32 or float64");
  return *static_cast<const float*>(t.const_data_ptr());
}

inline Type student_type(const Tensor& t, const char* op, size_t i) {
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

inline Type grad_type(const Tensor& t, const char* op, size_t i) {
  if (t.scalar_type() == ScalarType::BFloat16) return Type::bf16;
  ATST_CHECK(t.scalar_type() == ScalarType::Float, op, ": grads[", i, "] must be float32 or bfloat16");
  return Type::f32;
}

template <class Place>
Type check_pair(const Tensor& teacher, const Tensor& student, const char* op, size_t i, const Place& place) {
  check_entry(teacher, op, "teacher", i, place);
  check_entry(student, op, "student", i, place);
  check_float(teacher, op, "teacher", i);
  ATST_CHECK(teacher.sizes().equals(student.sizes()), op, ": student[", i, "] must have the shape of teacher[", i, "]");
  return student_type(student, op, i);
}

// Returns the type of grads[i].
template <class Place>
Type check_grad(const Tensor& grad, const char* op, size_t i, const Place& place) {
  check_entry(grad, op, "grads", i, place);
  return grad_type(grad, op, i);
}

struct AdamWLists {
  const TensorList &params, &grads, &exp_avgs, &exp_avg_sqs, &steps, &teachers, &student_shadows, &teacher_shadows;
};

// One parameter and what it has; null is what it does not have (no step: no AdamW step).
struct AdamWTensors {
  const Tensor *param, *grad, *exp_avg, *exp_avg_sq, *step, *teacher, *student_shadow, *teacher_shadow;
  Type grad_type;
  size_t group;

  bool idle() const { return !step && !teacher && !student_shadow; }
};

// list[i], or null where it has no elements; its shape must be that of the parameter.
template <class Place>
const Tensor* partner(const TensorList& list, size_t i, const Tensor& param, const char* name, const Place& place) {
  const char* op = "adamw_ema_";
  if (list.empty() || list[i].numel() == 0) return nullptr;
  check_entry(list[i], op, name, i, place);
  ATST_CHECK(list[i].sizes().equals(param.sizes()), op, ": ", name, "[", i, "] must have the shape of params[", i, "]");
  return &list[i];
}

inline void check_partner(const Tensor* t, ScalarType dtype, const char* name, size_t i) {
  ATST_CHECK(!t || t->scalar_type() == dtype, "adamw_ema_: ", name, "[", i, "] has the wrong dtype");
}

template <class Place>
AdamWTensors adamw_tensors(const AdamWLists& lists, size_t i, size_t group, const Place& place) {
  const char* op = "adamw_ema_";
  const Tensor& p = lists.params[i];
  check_entry(p, op, "params", i, place);
  check_float(p, op, "params", i);
  AdamWTensors a{};
  a.param = &p, a.group = group;
  a.teacher = partner(lists.teachers, i, p, "teachers", place);
  a.student_shadow = partner(lists.student_shadows, i, p, "student_shadows", place);
  a.teacher_shadow = partner(lists.teacher_shadows, i, p, "teacher_shadows", place);
  check_partner(a.teacher, ScalarType::Float, "teachers", i);
  check_partner(a.student_shadow, ScalarType::BFloat16, "student_shadows", i);
  check_partner(a.teacher_shadow, ScalarType::BFloat16, "teacher_shadows", i);
  ATST_CHECK(!a.teacher_shadow || a.teacher, op, ": teacher_shadows[", i, "] must come with a teacher");
  if (lists.steps[i].numel() == 0) return a;
  const Tensor& step = lists.steps[i];
  place(step, "steps", i);
  ATST_CHECK(step.numel() == 1, op, ": steps[", i, "] must be a tensor of one value");
  check_float(step, op, "steps", i);
  a.step = &step;
  a.grad = partner(lists.grads, i, p, "grads", place);
  a.exp_avg = partner(lists.exp_avgs, i, p, "exp_avgs", place);
  a.exp_avg_sq = partner(lists.exp_avg_sqs, i, p, "exp_avg_sqs", place);
  check_partner(a.exp_avg, ScalarType::Float, "exp_avgs", i);
  check_partner(a.exp_avg_sq, ScalarType::Float, "exp_avg_sqs", i);
  ATST_CHECK(p.numel() == 0 || (a.grad && a.exp_avg && a.exp_avg_sq), op, ": grads[", i, "], exp_avgs[", i,
             "] and exp_avg_sqs[", i, "] must have the shape of params[", i, "] where steps[", i, "] is given");
  if (a.grad) a.grad_type = grad_type(*a.grad, op, i);
  return a;
}

// All parameters, checked, in order.
template <class Place>
std::vector<AdamWTensors> adamw_tensors(const AdamWLists& lists, const Tensor& hyper,
                                        const std::vector<int64_t>& group_sizes, const Place& place) {
  const char* op = "adamw_ema_";
  const char* names[] = {"grads", "exp_avgs", "exp_avg_sqs", "steps", "teachers", "student_shadows", "teacher_shadows"};
  const TensorList* others[] = {&lists.grads,    &lists.exp_avgs,        &lists.exp_avg_sqs,    &lists.steps,
                                &lists.teachers, &lists.student_shadows, &lists.teacher_shadows};
  for (int i = 0; i < 7; ++i) check_length(*others[i], lists.params, op, names[i], "params", i >= 4);
  ATST_CHECK(hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous() &&
                 hyper.numel() == kHyper * static_cast<int64_t>(group_sizes.size()),
             op, ": hyper must be float64 [groups, 5]");
  int64_t sum = 0;
  for (int64_t size : group_sizes) {
    ATST_CHECK(size >= 0, op, ": group_sizes must be 0 or more, got ", size);
    sum += size;
  }
  ATST_CHECK(sum == static_cast<int64_t>(lists.params.size()), op, ": group_sizes must add up to the number of params");
  std::vector<AdamWTensors> all;
  all.reserve(lists.params.size());
  for (size_t group = 0; group < group_sizes.size(); ++group)
    for (int64_t k = 0; k < group_sizes[group]; ++k) all.push_back(adamw_tensors(lists, all.size(), group, place));
  return all;
}

}  // namespace atst::ema
