// Teacher update and AdamW with the teacher update: elementwise, one read and one write of every value.
//
//   exp_avg    <- beta1 * exp_avg + (1 - beta1) * g,  exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g * g
//   p          <- p - decay_first * p
//   p          <- p - step_size * exp_avg / (sqrt(exp_avg_sq) * root_scale + eps)
//   p          <- p - decay_last * p
//   teacher    <- momentum * teacher + (1 - momentum) * p
//
// Both forms of AdamW are this formula: torch's has root_scale = 1 / sqrt(1 - beta2^t), the HuggingFace form has 1 and
// puts the correction into step_size. Bytes per parameter: 36 (five values read, four written), 8 for the teacher alone
// besides the student's 4.
#include "../simd.h"
#include "ema.h"

namespace atst::ATST_ISA {
namespace {

using ema::Type;

typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

ATST_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(__builtin_ia32_sqrtps512_mask(x, x, -1, 4));
#elif defined(__AVX2__)
  return __builtin_ia32_sqrtps256(x);
#elif defined(__SSE2__)
  return __builtin_ia32_sqrtps(x);
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

ATST_INLINE vi load_half_bits(const uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vi);
}

template <Type T>
ATST_INLINE vf load_as(const void* p, int64_t i) {
  if constexpr (T == Type::f32) return load(static_cast<const float*>(p) + i);
  const vi h = load_half_bits(static_cast<const uint16_t*>(p) + i);
  if constexpr (T == Type::bf16) return bits_as_float(h << 16);
  // float16: exponent and fraction moved into place and rescaled by 2^112, which makes subnormals right as well;
  // exponent 31 (infinity, NaN) becomes 255.
  const vi magnitude = (h & 0x7fff) << 13;
  const vf scaled = bits_as_float(magnitude) * 0x1p112f;
  const vi bits = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : float_as_bits(scaled);
  return bits_as_float(bits | ((h & 0x8000) << 16));
}

ATST_INLINE void store_bf16(uint16_t* p, vf x) {
  const vi bits = float_as_bits(x);
  const vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vi quiet_nan = (bits >> 16) | 0x40;
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(x != x ? quiet_nan : rounded, vh);
}

// The last n < kLanes elements go through a full vector on the stack, so that they get the same operations.
template <class T>
ATST_INLINE void copy_tail(T* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

template <Type T>
ATST_INLINE vf lerp_at(const float* teacher, const void* student, int64_t i, vf momentum, vf rest) {
  return load(teacher + i) * momentum + load_as<T>(student, i) * rest;
}

template <Type T>
void ema_loop(const ema::EmaItem& item, float momentum, float rest) {
  const vf vm = splat(momentum), vr = splat(rest);
  const int64_t whole = item.n - item.n % kLanes, tail = item.n - whole;
  for (int64_t i = 0; i < whole; i += kLanes)
    store(item.teacher + i, lerp_at<T>(item.teacher, item.student, i, vm, vr));
  if (tail == 0) return;
  float t[kLanes] = {};
  uint32_t s[kLanes] = {};
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  copy_tail(t, item.teacher + whole, tail);
  copy_tail(reinterpret_cast<char*>(s), static_cast<const char*>(item.student) + whole * size, tail * size);
  store(t, lerp_at<T>(t, s, 0, vm, vr));
  copy_tail(item.teacher + whole, t, tail);
}

struct Constants {
  vf beta1, rest1, beta2, rest2, step_size, root_scale, eps, decay_first, decay_last, grad_scale, momentum, rest;
};

// kLanes values at offset i: kGrad says whether the AdamW step happens.
template <bool kGrad>
ATST_INLINE void adamw_at(const ema::AdamWItem& a, int64_t i, const Constants& c) {
  vf p = load(a.param + i);
  if constexpr (kGrad) {
    const vf g = load(a.grad + i) * c.grad_scale;
    const vf m = load(a.exp_avg + i) * c.beta1 + g * c.rest1;
    const vf v = load(a.exp_avg_sq + i) * c.beta2 + g * c.rest2 * g;
    store(a.exp_avg + i, m);
    store(a.exp_avg_sq + i, v);
    p = p - p * c.decay_first;
    p = p - c.step_size * m / (sqrt(v) * c.root_scale + c.eps);
    p = p - p * c.decay_last;
    store(a.param + i, p);
  }
  if (a.student_shadow) store_bf16(a.student_shadow + i, p);
  if (a.teacher) {
    const vf t = load(a.teacher + i) * c.momentum + p * c.rest;
    store(a.teacher + i, t);
    if (a.teacher_shadow) store_bf16(a.teacher_shadow + i, t);
  }
}

template <bool kGrad>
void adamw_loop(const ema::AdamWItem& a, const Constants& c) {
  const int64_t whole = a.n - a.n % kLanes, tail = a.n - whole;
  for (int64_t i = 0; i < whole; i += kLanes) adamw_at<kGrad>(a, i, c);
  if (tail == 0) return;
  float p[kLanes] = {}, g[kLanes] = {}, m[kLanes] = {}, v[kLanes] = {}, t[kLanes] = {};
  uint16_t ps[kLanes], ts[kLanes];
  ema::AdamWItem b = a;
  b.param = p, b.grad = g, b.exp_avg = m, b.exp_avg_sq = v;
  if (a.teacher) b.teacher = t, copy_tail(t, a.teacher + whole, tail);
  if (a.student_shadow) b.student_shadow = ps;
  if (a.teacher_shadow) b.teacher_shadow = ts;
  copy_tail(p, a.param + whole, tail);
  if (kGrad) {
    copy_tail(g, a.grad + whole, tail);
    copy_tail(m, a.exp_avg + whole, tail);
    copy_tail(v, a.exp_avg_sq + whole, tail);
  }
  adamw_at<kGrad>(b, 0, c);
  if (kGrad) {
    copy_tail(a.param + whole, p, tail);
    copy_tail(a.exp_avg + whole, m, tail);
    copy_tail(a.exp_avg_sq + whole, v, tail);
  }
  if (a.teacher) copy_tail(a.teacher + whole, t, tail);
  if (a.student_shadow) copy_tail(a.student_shadow + whole, ps, tail);
  if (a.teacher_shadow) copy_tail(a.teacher_shadow + whole, ts, tail);
}

}  // namespace

void ema_update(const ema::EmaItem& item, float momentum, float rest) {
  switch (item.student_type) {
    case Type::f32:
      return ema_loop<Type::f32>(item, momentum, rest);
    case Type::bf16:
      return ema_loop<Type::bf16>(item, momentum, rest);
    case Type::f16:
      return ema_loop<Type::f16>(item, momentum, rest);
  }
}

void adamw_ema(const ema::AdamWItem& item, float grad_scale, float momentum, float rest) {
  const ema::AdamWStep& s = item.step;
  const Constants c{splat(s.beta1),      splat(s.one_minus_beta1), splat(s.beta2),  splat(s.one_minus_beta2),
                    splat(s.step_size),  splat(s.root_scale),      splat(s.eps),    splat(s.decay_first),
                    splat(s.decay_last), splat(grad_scale),        splat(momentum), splat(rest)};
  item.grad ? adamw_loop<true>(item, c) : adamw_loop<false>(item, c);
}

double sum_of_squares(const float* x, int64_t n) {
  typedef double vd __attribute__((vector_size(8 * kLanes)));
  vd sums = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vd d = __builtin_convertvector(load(x + i), vd);
    sums += d * d;
  }
  double sum = 0;
  for (int64_t i = whole; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

}  // namespace atst::ATST_ISA
