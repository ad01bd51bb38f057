// What the shim's warp collectives, conversions and arithmetic give, for tests/cuda/test_shim_numbers.py.
#include "launch.cuh"

namespace atst {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ int thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

__device__ float2 wide(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ float2 wide(__half2 v) { return make_float2(__half2float(v.x), __half2float(v.y)); }
__device__ void set(__nv_bfloat162_raw* y, float2 v) { *y = __float22bfloat162_rn(v); }
__device__ void set(__half2_raw* y, float2 v) { *y = __halves2half2(__float2half_rn(v.x), __float2half_rn(v.y)); }

template <class Two, class Raw2>
__global__ void widen(const Raw2* x, float2* y, int pairs) {
  if (thread() < pairs) y[thread()] = wide(Two(x[thread()]));
}

template <class Raw2>
__global__ void narrow(const float2* x, Raw2* y, int pairs) {
  if (thread() < pairs) set(y + thread(), x[thread()]);
}

unsigned blocks(int64_t threads) { return static_cast<unsigned>((threads + 255) / 256); }

// pairs of bfloat16 or half as bits <-> pairs of float
template <class Two, class Raw2>
Tensor to_float(const Tensor& x) {
  const Call call("to_float", x);
  const Tensor y = torch::stable::new_empty(x, {x.numel()}, ScalarType::Float);
  const int pairs = static_cast<int>(x.numel() / 2);
  call.launch(widen<Two, Raw2>, blocks(pairs), 256, 0, call.in<Raw2>(x), call.out<float2>(y), pairs);
  return y;
}

template <class Raw2>
Tensor from_float(const Tensor& x) {
  const Call call("from_float", x);
  const Tensor y = torch::stable::new_empty(x, {x.numel()}, ScalarType::Short);
  const int pairs = static_cast<int>(x.numel() / 2);
  call.launch(narrow<Raw2>, blocks(pairs), 256, 0, call.in<float2>(x), call.out<Raw2>(y), pairs);
  return y;
}

// One warp; a row of out for each collective.
__global__ void collectives(const int64_t* x, int64_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t v = x[lane];
  const int word = static_cast<int>(v);
  int row = 0;
  const auto put = [&](int64_t r) { out[32 * row++ + lane] = r; };
  put(__shfl_sync(kAll, static_cast<long long>(v), 3));
  put(__shfl_sync(kAll, word, lane + 1, 8));
  put(__shfl_up_sync(kAll, v, 2));
  put(__shfl_up_sync(kAll, word, 3, 16));
  put(__shfl_down_sync(kAll, v, 5));
  put(__shfl_down_sync(kAll, word, 1, 4));
  put(__shfl_xor_sync(kAll, v, 9));
  put(__shfl_xor_sync(kAll, word, 5, 4));
  put(__ballot_sync(kAll, word > 0));
  put(__any_sync(kAll, lane == 7));
  put(__all_sync(kAll, lane >= 0));
  put(__any_sync(kAll, lane > 40));
  put(__all_sync(kAll, lane != 7));
  put(__match_any_sync(kAll, word & 3));
  put(__reduce_add_sync(kAll, word));
  put(__reduce_min_sync(kAll, word));
  put(__reduce_max_sync(kAll, word));
  put(__reduce_max_sync(kAll, static_cast<unsigned>(word)));
  put(__reduce_xor_sync(kAll, static_cast<unsigned>(word)));
  put(__syncthreads_count(word > 0));
}

Tensor run_collectives(const Tensor& x) {
  const Call call("collectives", x);
  const Tensor out = torch::stable::new_empty(x, {20, 32});
  call.launch(collectives, 1, 32, 0, call.in<int64_t>(x), call.out<int64_t>(out));
  return out;
}

__global__ void integers(const int64_t* x, int64_t* out, int n) {
  const int i = thread();
  if (i >= n) return;
  const auto v = static_cast<unsigned long long>(x[i]);
  const auto low = static_cast<unsigned>(v), high = static_cast<unsigned>(v >> 32);
  int row = 0;
  const auto put = [&](int64_t r) { out[n * row++ + i] = r; };
  put(__popcll(v));
  put(__clzll(static_cast<long long>(v)));
  put(__ffs(static_cast<int>(low)));
  put(__brev(low));
  put(__byte_perm(low, high, 0x2b60));
  put(__funnelshift_l(low, high, 40));
  put(__funnelshift_r(low, high, 7));
  put(__umulhi(low, high));
  put(__mulhi(static_cast<int>(low), static_cast<int>(high)));
  put(__float2int_rn(__int_as_float(static_cast<int>(low))));
  put(__float2uint_rz(__uint_as_float(high)));
}

Tensor run_integers(const Tensor& x) {
  const Call call("integers", x);
  const Tensor out = torch::stable::new_empty(x, {11, x.numel()});
  call.launch(integers, blocks(x.numel()), 256, 0, call.in<int64_t>(x), call.out<int64_t>(out),
              static_cast<int>(x.numel()));
  return out;
}

// Each product and sum apart, then what may be contracted.
__global__ void roundings(const float* x, float* out, int n) {
  const int i = thread();
  if (i >= n) return;
  const float a = x[i], b = x[n + i], c = x[2 * n + i];
  out[i] = __fadd_rn(__fmul_rn(a, b), c);
  out[n + i] = __fadd_rn(a * b, c);
  out[2 * n + i] = __fmul_rn(a, b) + c;
  out[3 * n + i] = __fmaf_rn(a, b, c);
  out[4 * n + i] = cospif(a);
  out[5 * n + i] = sinpif(a);
}

Tensor run_roundings(const Tensor& x) {
  const Call call("roundings", x);
  const Tensor out = torch::stable::new_empty(x, {6, x.size(1)});
  call.launch(roundings, blocks(x.size(1)), 256, 0, call.in<float>(x), call.out<float>(out),
              static_cast<int>(x.size(1)));
  return out;
}

STABLE_TORCH_LIBRARY(atst_shim_numbers, m) {
  m.def("from_bfloat16(Tensor x) -> Tensor");
  m.def("from_half(Tensor x) -> Tensor");
  m.def("to_bfloat16(Tensor x) -> Tensor");
  m.def("to_half(Tensor x) -> Tensor");
  m.def("collectives(Tensor x) -> Tensor");
  m.def("integers(Tensor x) -> Tensor");
  m.def("roundings(Tensor x) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(atst_shim_numbers, CPU, m) {
  m.impl("from_bfloat16", TORCH_BOX((&to_float<__nv_bfloat162, __nv_bfloat162_raw>)));
  m.impl("from_half", TORCH_BOX((&to_float<__half2, __half2_raw>)));
  m.impl("to_bfloat16", TORCH_BOX(&from_float<__nv_bfloat162_raw>));
  m.impl("to_half", TORCH_BOX(&from_float<__half2_raw>));
  m.impl("collectives", TORCH_BOX(&run_collectives));
  m.impl("integers", TORCH_BOX(&run_integers));
  m.impl("roundings", TORCH_BOX(&run_roundings));
}

}  // namespace
}  // namespace atst
