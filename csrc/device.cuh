// What a kernel (csrc/<op>/<op>_kernel.cuh) includes: CUDA itself, or, where a C++ compiler builds the kernels for the
// tests, the same names as C++ (tests/cuda_shim). Two things are spelled differently from plain CUDA, so that both can:
//   - shared memory is dynamic, and shared_memory<T>() is where it starts
//   - kernels are launched by launch() (csrc/launch.cuh), never with <<<>>>
#pragma once

#if defined(__CUDACC__)
#  include <cuda_bf16.h>
#  include <cuda_fp16.h>
#  include <cuda_runtime.h>
#else
#  include "cuda_shim.h"
#endif

#include <cstdint>

namespace atst {

#if defined(__CUDACC__)
// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char atst_shared[];
  return reinterpret_cast<T*>(atst_shared);
}
#else
template <class T>
T* shared_memory() {
  return static_cast<T*>(shim::shared_memory());
}
#endif

}  // namespace atst
