// Teacher update, AdamW with the teacher update, and the norm of all gradients, on the GPU: many tensors per launch.
//
// The formulas are those of ema_simd.cpp, operation by operation, and every operation is written with its rounding
// (__fmul_rn, __fmaf_rn, ...), so that no compiler fuses what another does not: the bits are those of the CPU.
// Division and square root are IEEE ones: some 90 instructions per parameter in all, where 40 bytes at 4.3 TB/s leave
// time for 250 on an H200.
//
// Work: a block of 256 threads takes one chunk of 8192 elements of one tensor (the norm: 16384), and finds the tensor
// by bisection. Chunks depend neither on the GPU nor on the other tensors, hence neither do the bits. Grid: one block
// per chunk. A thread loads 4 elements of each of adamw_kernel's five arrays (16 of ema_kernel's two and of
// norm_kernel's one) before it uses the first, in 16-byte accesses (8 bytes of a 16-bit type); where a pointer of the
// tensor is not aligned to that, in single elements, as many of them at once. 4 blocks of 64 registers per thread fit a
// multiprocessor; in flight are then up to 80 KB (80 bytes per thread), 128 KB (128 bytes) and 64 KB (64 bytes), where
// bandwidth times latency asks for some 40 KB on an H200. (8 elements in adamw_kernel leave room for 2 blocks, so for
// as many bytes and fewer warps.)
//
// Bytes per parameter, and the time of 86 M parameters at 4.3 TB/s: teacher update 8 + 4 (0.24 ms); AdamW with teacher
// and both shadows 20 + 20 with float32 gradients (0.80 ms), 18 + 20 with bfloat16 ones (0.76 ms); norm 4 (0.08 ms).
//
// Which tensors: a table in the kernel's parameters (32,764 bytes from CUDA 12.1 on). A table in device memory that is
// kept between calls would have to notice when a tensor moves, and be uploaded again when one does; this one travels
// with the launch, cannot be stale, and a CUDA graph holds its own copy. What a graph must be able to change is read
// from device memory: learning rate and the like, momentum, the gradients' factor, the steps.
//
// Numbers in device memory cannot be refused with an error. A momentum outside [0, 1] makes the teachers NaN; a
// learning rate, decay, beta or eps out of range makes parameters and moments NaN, a step that is none the parameters.
#pragma once

#include "../device.cuh"
#include "adamw_step.h"
#include "elements.cuh"

namespace atst::ema {

constexpr int kThreads = 256;
constexpr int kChunk = 8192;
constexpr int kNormChunk = 16384;
constexpr size_t kParameterBytes = 32764;

// A float32 or float64 number in device memory, or a value that the launch carries.
struct Number {
  const void* address;
  double value;
  bool wide;

  __device__ double get() const {
    if (!address) return value;
    return wide ? *static_cast<const double*>(address) : static_cast<double>(*static_cast<const float*>(address));
  }
};

// `first`: chunks of the table before this tensor's. `vectors`: all pointers are aligned.
struct EmaEntry {
  float* teacher;
  const void* student;
  int64_t n;
  unsigned first;
  Type type;
  bool vectors;
};

struct EmaTable {
  Number momentum;
  int count;
  static constexpr int kEntries = 1000;
  EmaEntry entries[kEntries];
};

// Null: what the parameter does not have. Without step there is no AdamW step; with one and n > 0 there is a gradient.
struct AdamWEntry {
  float *param, *exp_avg, *exp_avg_sq, *step, *teacher;
  const void* grad;
  uint16_t *student_shadow, *teacher_shadow;
  int64_t n;
  unsigned first;
  unsigned group : 30;
  bool bf16_grad : 1;
  bool vectors : 1;
};

struct AdamWTable {
  const double* hyper;  // [groups, kHyper]
  unsigned* started;    // 0; counts blocks
  Number momentum, grad_scale;
  int count;
  bool hf;
  static constexpr int kEntries = 400;
  AdamWEntry entries[kEntries];
};

struct NormEntry {
  const void* x;
  int64_t n;
  unsigned first;
  Type type;
  bool vectors;
};

// One sum of squares per chunk goes to sums[0], sums[1], ...; the table whose `total` is not 0 comes last and adds the
// `total` sums that end with its own.
struct NormTable {
  double *sums, *norm;
  unsigned* finished;  // 0; counts blocks
  int64_t total;
  int count;
  static constexpr int kEntries = 1000;
  NormEntry entries[kEntries];
};

static_assert(sizeof(EmaTable) <= kParameterBytes && sizeof(AdamWTable) <= kParameterBytes &&
              sizeof(NormTable) <= kParameterBytes);

namespace {

// The tensor that holds a chunk: the last one that does not begin after it, so never one without elements.
template <class Table>
__device__ __forceinline__ int entry_of(const Table& table, unsigned chunk) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// 1 - momentum; NaN where the momentum is out of range.
__device__ __forceinline__ float rest_of(const Number& momentum) {
  const double m = momentum.get();
  return m >= 0 && m <= 1 ? static_cast<float>(1 - m) : __uint_as_float(0x7fffffff);
}

// A chunk of a tensor: `units` whole units of 4 elements, where it may be read so, and `singles` after them.
struct Chunk {
  int64_t offset;
  int units, singles;

  template <class Entry>
  __device__ Chunk(const Entry& entry, unsigned chunk, int size) : offset(int64_t{chunk - entry.first} * size) {
    const int64_t left = entry.n - offset;
    const int n = left < size ? static_cast<int>(left) : size;
    units = entry.vectors ? n / 4 : 0;
    singles = n - 4 * units;
  }
};

// run.at<k>(u) for the units u, u + kThreads, ... of this thread: k = kAtOnce of them together while a block has so
// many, then one by one.
template <int kAtOnce, class Run>
__device__ __forceinline__ void for_each_unit(int units, const Run& run) {
  int u = static_cast<int>(threadIdx.x);
  for (int end = kAtOnce * kThreads; end <= units; end += kAtOnce * kThreads, u += kAtOnce * kThreads)
    run.template at<kAtOnce>(u);
  for (; u < units; u += kThreads) run.template at<1>(u);
}

template <Type T, int kWidth>
struct EmaRun {
  float* teacher;
  const void* student;
  Lerp lerp;

  template <int kUnits>
  __device__ __forceinline__ void at(int u) const {
    float t[kUnits][kWidth], s[kUnits][kWidth];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) load<Type::f32>(teacher, u + k * kThreads, t[k]);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) load<T>(student, u + k * kThreads, s[k]);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) t[k][j] = lerp(t[k][j], s[k][j]);
      store(teacher, u + k * kThreads, t[k]);
    }
  }
};

template <Type T>
__device__ __forceinline__ void ema_chunk(const EmaEntry& entry, const Lerp& lerp) {
  const Chunk chunk(entry, blockIdx.x, kChunk);
  float* teacher = entry.teacher + chunk.offset;
  const void* student = advance<T>(entry.student, chunk.offset);
  for_each_unit<4>(chunk.units, EmaRun<T, 4>{teacher, student, lerp});
  teacher += 4 * chunk.units, student = advance<T>(student, 4 * chunk.units);
  for_each_unit<16>(chunk.singles, EmaRun<T, 1>{teacher, student, lerp});
}

__global__ void __launch_bounds__(kThreads, 4) ema_kernel(const __grid_constant__ EmaTable table) {
  const EmaEntry& entry = table.entries[entry_of(table, blockIdx.x)];
  const Lerp lerp = Lerp::of(rest_of(table.momentum));
  if (entry.type == Type::f32)
    ema_chunk<Type::f32>(entry, lerp);
  else if (entry.type == Type::bf16)
    ema_chunk<Type::bf16>(entry, lerp);
  else
    ema_chunk<Type::f16>(entry, lerp);
}

enum class Grad { none, f32, bf16 };

// What all threads of a block share, derived by the first one.
struct AdamWShared {
  AdamWStep step;
  float grad_scale, rest;
  bool last;
};

template <class T>
__device__ __forceinline__ T* shifted(T* p, int64_t offset) {
  return p ? p + offset : nullptr;
}

template <Grad kGrad, int kWidth>
struct AdamWRun {
  static constexpr Type kType = kGrad == Grad::bf16 ? Type::bf16 : Type::f32;
  float *param, *exp_avg, *exp_avg_sq, *teacher;
  const void* grad;
  uint16_t *student_shadow, *teacher_shadow;
  AdamWStep c;
  float grad_scale;
  Lerp lerp;

  __device__ AdamWRun(const AdamWEntry& e, int64_t offset, const AdamWShared& shared)
      : param(shifted(e.param, offset)),
        exp_avg(shifted(e.exp_avg, offset)),
        exp_avg_sq(shifted(e.exp_avg_sq, offset)),
        teacher(shifted(e.teacher, offset)),
        grad(e.grad ? advance<kType>(e.grad, offset) : nullptr),
        student_shadow(shifted(e.student_shadow, offset)),
        teacher_shadow(shifted(e.teacher_shadow, offset)),
        c(shared.step),
        grad_scale(shared.grad_scale),
        lerp(Lerp::of(shared.rest)) {}

  __device__ __forceinline__ void update(float& p, float& m, float& v, float g) const {
    g = __fmul_rn(g, grad_scale);
    m = __fmaf_rn(m, c.beta1, __fmul_rn(g, c.one_minus_beta1));
    v = __fmaf_rn(v, c.beta2, __fmul_rn(__fmul_rn(g, c.one_minus_beta2), g));
    p = __fmaf_rn(p, -c.decay_first, p);
    const float denominator = __fmaf_rn(__fsqrt_rn(v), c.root_scale, c.eps);
    p = __fsub_rn(p, __fdiv_rn(__fmul_rn(c.step_size, m), denominator));
    p = __fmaf_rn(p, -c.decay_last, p);
  }

  template <int kUnits>
  __device__ __forceinline__ void at(int first) const {
    float p[kUnits][kWidth], m[kUnits][kWidth], v[kUnits][kWidth], g[kUnits][kWidth], t[kUnits][kWidth];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const int u = first + k * kThreads;
      load<Type::f32>(param, u, p[k]);
      if constexpr (kGrad != Grad::none) {
        load<kType, kWidth, true>(grad, u, g[k]);
        load<Type::f32, kWidth, true>(exp_avg, u, m[k]);
        load<Type::f32, kWidth, true>(exp_avg_sq, u, v[k]);
      }
    }
    if (teacher) {
#pragma unroll
      for (int k = 0; k < kUnits; ++k) load<Type::f32>(teacher, first + k * kThreads, t[k]);
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const int u = first + k * kThreads;
      if constexpr (kGrad != Grad::none) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) update(p[k][j], m[k][j], v[k][j], g[k][j]);
        store<kWidth, true>(exp_avg, u, m[k]);
        store<kWidth, true>(exp_avg_sq, u, v[k]);
        store(param, u, p[k]);
      }
      if (student_shadow) store_bf16(student_shadow, u, p[k]);
      if (!teacher) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) t[k][j] = lerp(t[k][j], p[k][j]);
      store(teacher, u, t[k]);
      if (teacher_shadow) store_bf16(teacher_shadow, u, t[k]);
    }
  }
};

template <Grad kGrad>
__device__ __forceinline__ void adamw_chunk(const AdamWEntry& entry, const AdamWShared& shared) {
  const Chunk chunk(entry, blockIdx.x, kChunk);
  for_each_unit<1>(chunk.units, AdamWRun<kGrad, 4>(entry, chunk.offset, shared));
  for_each_unit<4>(chunk.singles, AdamWRun<kGrad, 1>(entry, chunk.offset + 4 * chunk.units, shared));
}

__device__ __forceinline__ AdamWStep step_of_entry(const AdamWTable& table, const AdamWEntry& entry) {
  double hyper[kHyper];
#pragma unroll
  for (int i = 0; i < kHyper; ++i) hyper[i] = table.hyper[kHyper * entry.group + i];
  const float nan = __uint_as_float(0x7fffffff);
  if (first_invalid(hyper) != kHyper) return {nan, nan, nan, nan, nan, nan, nan, nan, nan};
  return step_of(hyper, *entry.step + 1.0, table.hf);
}

// The steps are counted by the block that is the last to have read its own.
__global__ void __launch_bounds__(kThreads, 4) adamw_kernel(const __grid_constant__ AdamWTable table) {
  auto* shared = shared_memory<AdamWShared>();
  const AdamWEntry& entry = table.entries[entry_of(table, blockIdx.x)];
  if (threadIdx.x == 0) {
    shared->step = entry.step ? step_of_entry(table, entry) : AdamWStep{};
    shared->grad_scale = static_cast<float>(table.grad_scale.get());
    shared->rest = rest_of(table.momentum);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared->last = atomicAdd(table.started, 1u) == gridDim.x - 1;
  }
  if (!entry.step)
    adamw_chunk<Grad::none>(entry, *shared);
  else if (entry.bf16_grad)
    adamw_chunk<Grad::bf16>(entry, *shared);
  else
    adamw_chunk<Grad::f32>(entry, *shared);
  __syncthreads();
  if (!shared->last) return;
  __threadfence();
  for (int i = threadIdx.x; i < table.count; i += kThreads)
    if (float* step = table.entries[i].step) atomicAdd(step, 1.0f);
}

template <Type T, int kWidth>
struct SquaresRun {
  const void* x;
  double* sum;

  template <int kUnits>
  __device__ __forceinline__ void at(int u) const {
    float v[kUnits][kWidth];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) load<T>(x, u + k * kThreads, v[k]);
    // 4 sums that do not wait for each other
#pragma unroll
    for (int k = 0; k < kUnits * kWidth; ++k) {
      const double d = v[k / kWidth][k % kWidth];
      sum[k % 4] = __fma_rn(d, d, sum[k % 4]);
    }
  }
};

template <Type T>
__device__ __forceinline__ double squares(const NormEntry& entry) {
  const Chunk chunk(entry, blockIdx.x, kNormChunk);
  double sum[4] = {};
  const void* x = advance<T>(entry.x, chunk.offset);
  for_each_unit<4>(chunk.units, SquaresRun<T, 4>{x, sum});
  for_each_unit<16>(chunk.singles, SquaresRun<T, 1>{advance<T>(x, 4 * chunk.units), sum});
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The sum over the block's threads, in an order of its own; known to the first thread.
__device__ __forceinline__ double sum_of_block(double value, double* shared) {
  shared[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  return threadIdx.x == 0 ? shared[0] : 0.0;
}

// float64 throughout: one conversion and one addition per element, a quarter of the time that reading it takes.
__global__ void __launch_bounds__(kThreads, 4) norm_kernel(const __grid_constant__ NormTable table) {
  auto* shared = shared_memory<double>();
  auto* last = reinterpret_cast<bool*>(shared + kThreads);
  const NormEntry& entry = table.entries[entry_of(table, blockIdx.x)];
  const double sum =
      sum_of_block(entry.type == Type::f32 ? squares<Type::f32>(entry) : squares<Type::bf16>(entry), shared);
  if (threadIdx.x == 0) {
    table.sums[blockIdx.x] = sum;
    __threadfence();
    *last = table.total > 0 && atomicAdd(table.finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  const double* sums = table.sums + gridDim.x - table.total;
  double part = 0;
  for (int64_t i = threadIdx.x; i < table.total; i += kThreads) part += __ldcg(sums + i);
  const double all = sum_of_block(part, shared);
  if (threadIdx.x == 0) *table.norm = sqrt(all);
}

}  // namespace
}  // namespace atst::ema
