// Small kernels for tests/cuda/test_shim.py: one half are right, the other half have one bug each.
#include "launch.cuh"

namespace atst {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ float warp_sum(float x) {
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

__global__ void block_sum(const float* __restrict__ x, float* __restrict__ out, int n) {
  float* partial = shared_memory<float>();
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = warp_sum(threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

__global__ void transpose(const float4* x, float4* out) {  // 32 x 32 per block
  float* tile = shared_memory<float>();
  const float4 v = x[blockIdx.x * 256 + threadIdx.x];
  const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 4;
  tile[row * 33 + column] = v.x, tile[row * 33 + column + 1] = v.y;
  tile[row * 33 + column + 2] = v.z, tile[row * 33 + column + 3] = v.w;
  __syncthreads();
  const auto at = [&](int i) { return tile[(column + i) * 33 + row]; };
  out[blockIdx.x * 256 + threadIdx.x] = make_float4(at(0), at(1), at(2), at(3));
}

enum Last {
  kRight,
  kRightInOneWarp,
  kRightOfOtherLane,
  kNoFence,
  kFenceFirst,
  kPlainRead,
  kNoBarrierHere,
  kNoFenceHere
};

__global__ void last_block_sums(const float* x, float* partial, unsigned* done, float* out, Last how) {
  bool* shared = shared_memory<bool>();
  const float sum = warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  bool last = false;
  if (how == kFenceFirst) __threadfence();
  if (threadIdx.x == (how == kRightOfOtherLane ? 5 : 0)) partial[blockIdx.x] = sum;
  if (how == kRightOfOtherLane) __syncwarp();
  if (threadIdx.x == 0) {
    if (how != kNoFence && how != kFenceFirst) __threadfence();
    last = atomicAdd(done, 1) == gridDim.x - 1;
    *shared = last;
  }
  if (how == kRightInOneWarp) {
    last = __shfl_sync(kAll, static_cast<int>(last), 0);
  } else if (how != kNoBarrierHere) {
    __syncthreads();
    last = *shared;
  } else {
    last = blockIdx.x == gridDim.x - 1;
  }
  if (!last) return;
  if (how != kNoFenceHere) __threadfence();
  float all = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) all += how == kPlainRead ? partial[i] : __ldcg(partial + i);
  all = warp_sum(all);
  if (threadIdx.x == 0) *out = all;
}

__global__ void half_warps(const float* x, float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  float* shared = shared_memory<float>();
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 16)
    for (int d = 8; d; d /= 2) v += __shfl_xor_sync(0xffffu, v, d, 16);
  else
    v -= __shfl_sync(0xffff0000u, v, 0, 16);
  shared[threadIdx.x] = v;
  __syncwarp(mask);
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// Each case: one bug (0: none), in a kernel that reverses 64 numbers.
enum Bug {
  kNone,
  kNoBarrier,
  kDivergent,
  kShuffleLeft,
  kUnwritten,
  kSharedEnd,
  kReadEnd,
  kWriteEnd,
  kWriteIn,
  kPartial,
  kMisaligned,
  kBlockRace,
  kReadOut,
  kHalfWarpRace,
  kOtherMask,
  kOutside,
  kEarlyExit,
  kReverseRace,
  kSpin,
  kMisalignedRead,
  kBefore,
  kBlockRead,
  kLocalEnd,
  kMemcpyEnd,
  kGlobalRace,
  kConstantLoad,
  kScratch,
  kConversion,
};

__global__ void bugs(const float* x, float* out, int* counter, float* scratch, Bug bug) {
  float* s = shared_memory<float>();
  const int i = threadIdx.x, n = blockDim.x;
  if (bug == kDivergent && i < 40) __syncthreads();
  if (bug == kEarlyExit && i == 63) return;
  if (bug == kShuffleLeft) {
    if (i == 5) return;
    s[i] = __shfl_xor_sync(kAll, x[i], 1);
  }
  if (!(bug == kUnwritten && i == 9)) s[i] = x[i];
  if (bug == kHalfWarpRace) {
    __syncwarp(i % 32 < 16 ? 0xffffu : 0xffff0000u);
    out[i] = s[i ^ 16];
    return;
  }
  if (bug == kReverseRace) out[i] = s[i ^ 32];
  if (bug == kOtherMask && i < 32) __shfl_sync(i < 16 ? kAll : 0xffff0000u, 1.0f, 0);
  if (bug != kNoBarrier) __syncthreads();
  if (bug == kSharedEnd && i == 63) s[n] = 1;
  if (bug == kReadEnd && i == 63) s[0] = x[n];
  if (bug == kBefore && i == 0) s[0] = x[-2];
  if (bug == kWriteEnd && i == 63) out[n] = 1;
  if (bug == kWriteIn && i == 2) const_cast<float*>(x)[i] += 1;
  if (bug == kMisaligned && i == 1) *reinterpret_cast<float4*>(out + i) = make_float4(1, 2, 3, 4);
  if (bug == kMisalignedRead && i == 1) s[0] = reinterpret_cast<const float2*>(x + i)->y;
  if (bug == kReadOut) s[i] += out[i];
  if (bug == kOutside && i == 3) s[i] = *reinterpret_cast<const float*>(0x1000);
  if (bug == kSpin && i == 0)
    while (*const_cast<volatile int*>(counter) != 5) {
    }
  if (bug == kBlockRead && blockIdx.x != 0) s[i] = static_cast<float>(counter[0]);
  if (bug == kBlockRead && blockIdx.x == 0 && i == 0) counter[0] = 1;
  if (bug == kLocalEnd && i == 2) {
    float local[4] = {s[0], s[1], s[2], s[3]};
    s[i] = local[n >> 4];
  }
  if (bug == kMemcpyEnd && i == 0) memcpy(out, x, (n + 1) * sizeof(float));
  if (bug == kScratch && i == 5) s[i] = scratch[i];
  if (bug == kConversion && i == 5) out[i] = static_cast<int>(s[i] * 1e30f);
  if (!(bug == kPartial && i == 12) && (blockIdx.x == 0 || bug == kBlockRace)) out[i] = s[n - 1 - i];
  if (bug == kGlobalRace) out[i] = out[n - 1 - i];
  if (bug == kConstantLoad && i < 32) out[i] = __ldg(out + i);
}

Tensor empty(const Tensor& like, std::vector<int64_t> shape) { return torch::stable::new_empty(like, shape); }

Tensor run_block_sum(const Tensor& x) {
  const Call call("block_sum", x);
  const Tensor out = empty(x, {x.size(0)});
  call.launch(block_sum, unsigned(x.size(0)), 256, 8 * sizeof(float), call.in<float>(x), call.out<float>(out),
              int(x.size(1)));
  return out;
}

Tensor run_transpose(const Tensor& x) {
  const Call call("transpose", x);
  const Tensor out = empty(x, {x.size(0), 32, 32});
  call.launch(transpose, unsigned(x.size(0)), 256, 32 * 33 * sizeof(float), call.in<float4>(x), call.out<float4>(out));
  return out;
}

Tensor run_last_block_sums(const Tensor& x, int64_t how) {
  const Call call("last_block_sums", x);
  const Tensor out = empty(x, {}), partial = empty(x, {x.size(0)}), done = empty(x, {1});
  call.zero(call.scratch<unsigned>(done), 4);
  call.launch(last_block_sums, unsigned(x.size(0)), 32, 1, call.in<float>(x), call.scratch<float>(partial),
              call.scratch<unsigned>(done), call.out<float>(out), static_cast<Last>(how));
  return out;
}

Tensor run_half_warps(const Tensor& x) {
  const Call call("half_warps", x);
  const Tensor out = empty(x, {x.size(0)});
  call.launch(half_warps, 1, unsigned(x.size(0)), x.size(0) * 4, call.in<float>(x), call.out<float>(out));
  return out;
}

Tensor run_bugs(const Tensor& x, int64_t bug) {
  const Call call("bugs", x);
  const Tensor out = empty(x, {x.size(0)}), counter = empty(x, {1}), scratch = empty(x, {64});
  call.zero(call.scratch<int>(counter), 4);
  call.launch(bugs, bug == kBlockRace || bug == kBlockRead ? 2 : 1, unsigned(x.size(0)), x.size(0) * 4,
              call.in<float>(x), call.out<float>(out), call.scratch<int>(counter), call.scratch<float>(scratch),
              static_cast<Bug>(bug));
  return out;
}

STABLE_TORCH_LIBRARY(atst_shim_test, m) {
  m.def("block_sum(Tensor x) -> Tensor");
  m.def("transpose(Tensor x) -> Tensor");
  m.def("last_block_sums(Tensor x, int how) -> Tensor");
  m.def("half_warps(Tensor x) -> Tensor");
  m.def("bugs(Tensor x, int bug) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(atst_shim_test, CPU, m) {
  m.impl("block_sum", TORCH_BOX(&run_block_sum));
  m.impl("transpose", TORCH_BOX(&run_transpose));
  m.impl("last_block_sums", TORCH_BOX(&run_last_block_sums));
  m.impl("half_warps", TORCH_BOX(&run_half_warps));
  m.impl("bugs", TORCH_BOX(&run_bugs));
}

}  // namespace
}  // namespace atst
