// Runs random programs of accesses, warp barriers and block barriers, for tests/cuda/test_shim_races.py.
#include "launch.cuh"

namespace atst {
namespace {

// What a thread does in one step. SyncWarp: its mask instead of the address.
enum Step { kNothing, kRead, kWrite, kAtomic, kSyncWarp, kSyncBlock };

template <class T>
__device__ int touch(Step step, unsigned char* at) {
  T* p = reinterpret_cast<T*>(at);
  if (step == kRead) return static_cast<int>(*p);
  *p = 1;
  return 0;
}

// program: for each step and thread (step, offset or mask, bytes)
__global__ void interpret(const int64_t* program, int* out, int steps) {
  unsigned char* s = shared_memory<unsigned char>();
  const int i = threadIdx.x, n = blockDim.x;
  if (i == 0) *reinterpret_cast<int4*>(s) = make_int4(0, 0, 0, 0);
  __syncthreads();
  int sink = 0;
  for (int k = 0; k < steps; ++k) {
    const int64_t* now = program + (k * n + i) * 3;
    const Step step = static_cast<Step>(now[0]);
    unsigned char* at = s + (step == kSyncWarp ? 0 : now[1]);
    if (step == kSyncWarp) __syncwarp(static_cast<unsigned>(now[1]));
    if (step == kSyncBlock) __syncthreads();
    if (step == kAtomic) atomicAdd(reinterpret_cast<int*>(at), 1);
    if (step != kRead && step != kWrite) continue;
    sink += now[2] == 4 ? touch<int>(step, at) : now[2] == 2 ? touch<short>(step, at) : touch<unsigned char>(step, at);
  }
  out[i] = sink;
}

Tensor run(const Tensor& program) {
  const Call call("interpret", program);
  const int64_t steps = program.size(0), threads = program.size(1);
  const Tensor out = torch::stable::new_empty(program, {threads}, ScalarType::Int);
  call.launch(interpret, 1, static_cast<unsigned>(threads), 16, call.in<int64_t>(program), call.out<int>(out),
              static_cast<int>(steps));
  return out;
}

STABLE_TORCH_LIBRARY(atst_shim_programs, m) { m.def("interpret(Tensor program) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(atst_shim_programs, CPU, m) { m.impl("interpret", TORCH_BOX(&run)); }

}  // namespace
}  // namespace atst
