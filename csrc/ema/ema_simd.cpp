// Teacher update and AdamW with the teacher update: elementwise, one read and one write of every value.
//
//   exp_avg    <- beta1 * exp_avg + (1 - beta1) * g,  exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g * g
//   p          <- p - decay_first * p
//   p          <- p - step_size * exp_avg / (sqrt(exp_avg_sq) * root_scale + eps)
//   p          <- p - decay_last * p
//   teacher    <- teacher + (1 - momentum) * (p - teacher)
//
// Both forms of AdamW are this formula: torch's has root_scale = 1 / sqrt(1 - beta2^t), the HuggingFace form has 1 and
// puts the correction into step_size. Decays are fma(-decay, p, p), not p * (1 - decay): for the usual decays of 1e-5
// and less the rounding of that factor would be a good part of the decay.
//
// Bytes per parameter: 20 read and 16 written by AdamW with teacher, 8 and 4 by the teacher update. What bounds them is
// how many cache lines a core can have in flight (reads; the writes hide behind them). The hardware prefetchers keep
// two streams going but fall behind on five, hence the prefetches; square root and division are hidden as well.
#include "../simd.h"
#include "ema.h"

namespace atst::ATST_ISA {
namespace {

using ema::Type;

typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

constexpr int64_t kLine = 16;        // floats per cache line
constexpr int64_t kAhead = 16 * 16;  // floats between a prefetch and its use

template <Type T>
constexpr int64_t kSize = T == Type::f32 ? 4 : 2;

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

ATST_INLINE vh to_bf16(vf x) {
  const vi bits = float_as_bits(x);
  const vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vi quiet_nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(x != x ? quiet_nan : rounded, vh);
}

// kStream: past the caches (p aligned to its vector), which spares the reading of lines that are only written.
template <bool kStream>
ATST_INLINE void store_bf16(uint16_t* p, vf x) {
  const vh h = to_bf16(x);
#if defined(__x86_64__)
  typedef long long wide __attribute__((vector_size(2 * kLanes), may_alias));
  if constexpr (kStream) {
#  if defined(__AVX512F__)
    return __builtin_ia32_movntdq256(reinterpret_cast<wide*>(p), reinterpret_cast<wide>(h));
#  elif defined(__AVX2__)
    return __builtin_ia32_movntdq(reinterpret_cast<wide*>(p), reinterpret_cast<wide>(h));
#  else
    return __builtin_ia32_movnti64(reinterpret_cast<long long*>(p), reinterpret_cast<wide>(h)[0]);
#  endif
  }
#endif
  *reinterpret_cast<vh_unaligned*>(p) = h;
}

// x to y by `weight` (at most 1/2), of teacher and student whichever is nearer to the result: exact where they are
// equal and at momentum 0 and 1, and the weights of both sum to 1, which a rounded momentum and 1 - momentum need not.
struct Lerp {
  vf weight;
  vi from_student;

  explicit Lerp(float rest) : weight(splat(rest <= 0.5f ? rest : 1 - rest)), from_student(splat_i(-(rest > 0.5f))) {}

  ATST_INLINE vf operator()(vf teacher, vf student) const {
    const vf x = from_student ? student : teacher, y = from_student ? teacher : student;
    return fma(weight, y - x, x);
  }
};

// The last n < kLanes elements go through a full vector on the stack, so that they get the same operations.
template <class T>
ATST_INLINE void copy_tail(T* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

template <Type T>
void ema_loop(const ema::EmaItem& item, const Lerp& lerp) {
  const int64_t whole = item.n - item.n % kLanes, tail = item.n - whole;
  for (int64_t i = 0; i < whole; i += kLanes)
    store(item.teacher + i, lerp(load(item.teacher + i), load_as<T>(item.student, i)));
  if (tail == 0) return;
  float t[kLanes] = {};
  uint32_t s[kLanes] = {};
  constexpr int64_t size = kSize<T>;
  copy_tail(t, item.teacher + whole, tail);
  copy_tail(reinterpret_cast<char*>(s), static_cast<const char*>(item.student) + whole * size, tail * size);
  store(t, lerp(load(t), load_as<T>(s, 0)));
  copy_tail(item.teacher + whole, t, tail);
}

struct Constants {
  vf beta1, rest1, beta2, rest2, step_size, root_scale, eps, minus_decay_first, minus_decay_last, grad_scale;
  Lerp lerp;
};

// Whether the AdamW step happens, and on which gradients.
enum class Grad { none, f32, bf16 };

template <Grad kGrad>
constexpr Type kTypeOf = kGrad == Grad::bf16 ? Type::bf16 : Type::f32;

// kLanes values at offset i.
template <Grad kGrad, bool kStream>
ATST_INLINE void adamw_at(const ema::AdamWItem& a, int64_t i, const Constants& c) {
  vf p = load(a.param + i);
  if constexpr (kGrad != Grad::none) {
    const vf g = load_as<kTypeOf<kGrad>>(a.grad, i) * c.grad_scale;
    const vf m = fma(load(a.exp_avg + i), c.beta1, g * c.rest1);
    const vf v = fma(load(a.exp_avg_sq + i), c.beta2, g * c.rest2 * g);
    store(a.exp_avg + i, m);
    store(a.exp_avg_sq + i, v);
    p = fma(p, c.minus_decay_first, p);
    p = p - c.step_size * m / fma(sqrt(v), c.root_scale, c.eps);
    p = fma(p, c.minus_decay_last, p);
    store(a.param + i, p);
  }
  if (a.student_shadow) store_bf16<kStream>(a.student_shadow + i, p);
  if (a.teacher) {
    const vf t = c.lerp(load(a.teacher + i), p);
    store(a.teacher + i, t);
    if (a.teacher_shadow) store_bf16<kStream>(a.teacher_shadow + i, t);
  }
}

template <Grad kGrad>
ATST_INLINE void prefetch(const ema::AdamWItem& a, int64_t i) {
  __builtin_prefetch(a.param + i);
  if (a.teacher) __builtin_prefetch(a.teacher + i);
  if constexpr (kGrad == Grad::none) return;
  __builtin_prefetch(static_cast<const char*>(a.grad) + i * kSize<kTypeOf<kGrad>>);
  __builtin_prefetch(a.exp_avg + i);
  __builtin_prefetch(a.exp_avg_sq + i);
}

template <Grad kGrad, bool kStream>
void adamw_loop(const ema::AdamWItem& a, const Constants& c) {
  int64_t i = 0;
  for (; i + kLine <= a.n; i += kLine) {
    prefetch<kGrad>(a, i + kAhead);
    for (int64_t j = i; j < i + kLine; j += kLanes) adamw_at<kGrad, kStream>(a, j, c);
  }
#if defined(__x86_64__)
  if constexpr (kStream) __builtin_ia32_sfence();
#endif
  for (; i + kLanes <= a.n; i += kLanes) adamw_at<kGrad, false>(a, i, c);
  const int64_t tail = a.n - i;
  if (tail == 0) return;
  float p[kLanes] = {}, m[kLanes] = {}, v[kLanes] = {}, t[kLanes] = {};
  uint32_t g[kLanes] = {};
  uint16_t student[kLanes], teacher[kLanes];
  ema::AdamWItem b = a;
  b.param = p, b.grad = g, b.exp_avg = m, b.exp_avg_sq = v;
  if (a.teacher) b.teacher = t, copy_tail(t, a.teacher + i, tail);
  if (a.student_shadow) b.student_shadow = student;
  if (a.teacher_shadow) b.teacher_shadow = teacher;
  copy_tail(p, a.param + i, tail);
  if constexpr (kGrad != Grad::none) {
    constexpr int64_t size = kSize<kTypeOf<kGrad>>;
    copy_tail(reinterpret_cast<char*>(g), static_cast<const char*>(a.grad) + i * size, tail * size);
    copy_tail(m, a.exp_avg + i, tail);
    copy_tail(v, a.exp_avg_sq + i, tail);
  }
  adamw_at<kGrad, false>(b, 0, c);
  if constexpr (kGrad != Grad::none) {
    copy_tail(a.param + i, p, tail);
    copy_tail(a.exp_avg + i, m, tail);
    copy_tail(a.exp_avg_sq + i, v, tail);
  }
  if (a.teacher) copy_tail(a.teacher + i, t, tail);
  if (a.student_shadow) copy_tail(a.student_shadow + i, student, tail);
  if (a.teacher_shadow) copy_tail(a.teacher_shadow + i, teacher, tail);
}

template <Type T>
double squares(const void* x, int64_t n) {
  typedef double vd __attribute__((vector_size(8 * kLanes)));
  vd sums = {};
  const auto add = [&sums](vf values) {
    const vd d = __builtin_convertvector(values, vd);
    sums += d * d;
  };
  constexpr int64_t size = kSize<T>;
  const auto* bytes = static_cast<const char*>(x);
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    __builtin_prefetch(bytes + (i + 4 * kAhead) * size);
    add(load_as<T>(x, i));
  }
  if (n > whole) {
    uint32_t tail[kLanes] = {};
    copy_tail(reinterpret_cast<char*>(tail), bytes + whole * size, (n - whole) * size);
    add(load_as<T>(tail, 0));
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

}  // namespace

void ema_update(const ema::EmaItem& item, float rest) {
  const Lerp lerp(rest);
  switch (item.student_type) {
    case Type::f32:
      return ema_loop<Type::f32>(item, lerp);
    case Type::bf16:
      return ema_loop<Type::bf16>(item, lerp);
    case Type::f16:
      return ema_loop<Type::f16>(item, lerp);
  }
}

void adamw_ema(const ema::AdamWItem& item, float grad_scale, float rest, bool stream) {
  const ema::AdamWStep& s = item.step;
  const Constants c{splat(s.beta1),       splat(s.one_minus_beta1), splat(s.beta2), splat(s.one_minus_beta2),
                    splat(s.step_size),   splat(s.root_scale),      splat(s.eps),   splat(-s.decay_first),
                    splat(-s.decay_last), splat(grad_scale),        Lerp(rest)};
  const auto addresses =
      reinterpret_cast<uintptr_t>(item.student_shadow) | reinterpret_cast<uintptr_t>(item.teacher_shadow);
  const bool aligned = addresses % sizeof(vh) == 0;
  if (!item.grad)
    adamw_loop<Grad::none, false>(item, c);
  else if (item.grad_type == Type::f32)
    (stream && aligned ? adamw_loop<Grad::f32, true> : adamw_loop<Grad::f32, false>)(item, c);
  else
    (stream && aligned ? adamw_loop<Grad::bf16, true> : adamw_loop<Grad::bf16, false>)(item, c);
}

double sum_of_squares(const void* x, int64_t n, Type type) {
  return type == Type::f32 ? squares<Type::f32>(x, n) : squares<Type::bf16>(x, n);
}

}  // namespace atst::ATST_ISA
