// The host side of a CUDA operator (csrc/<op>/<op>_cuda.cu): its device, its stream, its pointers and its launches.
//
// The tests build the same files with a C++ compiler against tests/cuda_shim: then CPU tensors take the place of CUDA
// tensors, the operators are called torch.ops.atst_fast_shim.<op>, and launch() runs the kernel on the CPU. Pointers
// are obtained through in(), inout(), out() and scratch(), which tell the shim what a kernel may touch.
#pragma once

#include <utility>

#include "check.h"
#include "device.cuh"

#if defined(__CUDACC__)
#  include <torch/csrc/inductor/aoti_torch/c/shim.h>
#  include <torch/csrc/stable/accelerator.h>
#  define ATST_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(atst_fast, CUDA, m)
#else
#  define ATST_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(atst_fast_shim, CPU, m)
#endif

namespace atst {

#if defined(__CUDACC__)
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
#else
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
#endif

inline void check_device(const Tensor& t, const char* op, const char* name) {
  ATST_CHECK(on_device(t), op, ": ", name, " must be on a CUDA device");
}

// One call of an operator: makes the device of its tensors the current one while it lives, and knows the stream.
class Call {
 public:
  Call(const char* op, const Tensor& first) : op(op), device_(first.get_device_index()), guard_(device_) {
#if defined(__CUDACC__)
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &current));
    stream = static_cast<cudaStream_t>(current);
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    ATST_CHECK(major >= 8, op, ": needs a GPU of compute capability 8.0 or newer, got ", major, ".", minor);
#endif
  }
  Call(const Call&) = delete;

  // Checks that a tensor lies on the device of the first one.
  void same_device(const Tensor& t, const char* name) const {
    check_device(t, op, name);
    ATST_CHECK(t.get_device_index() == device_, op, ": ", name, " must be on device ", device_,
               ", as the first tensor is, got device ", t.get_device_index());
  }

  // Pointers for kernels. in: read; inout: read and written; out: written in full before anything reads it;
  // scratch: written before it is read. size in bytes is the tensor's.
  template <class T>
  const T* in(const Tensor& t) const {
    const void* p = t.const_data_ptr();
    permit(p, t, Access::in);
    return static_cast<const T*>(p);
  }
  template <class T>
  T* inout(const Tensor& t) const {
    void* p = t.mutable_data_ptr();
    permit(p, t, Access::inout);
    return static_cast<T*>(p);
  }
  template <class T>
  T* out(const Tensor& t) const {
    void* p = t.mutable_data_ptr();
    permit(p, t, Access::out);
    return static_cast<T*>(p);
  }
  template <class T>
  T* scratch(const Tensor& t) const {
    void* p = t.mutable_data_ptr();
    permit(p, t, Access::scratch);
    return static_cast<T*>(p);
  }

  void zero(void* p, size_t bytes) const {
#if defined(__CUDACC__)
    check(cudaMemsetAsync(p, 0, bytes, stream));
#else
    shim::zero(p, bytes);
#endif
  }

  // kernel(args...) on a grid of blocks with `shared` bytes of dynamic shared memory. An empty grid is no launch.
  template <class... P, class... A>
  void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A&&... args) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
    if (shared > 48 * 1024)  // always the same value: other threads may be about to launch the kernel with more
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit));
    if (shared > 16 * 1024)  // the occupancy that the kernels count on needs all of it, not what the driver may choose
      check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    kernel<<<grid, block, shared, stream>>>(P(std::forward<A>(args))...);
    check(cudaGetLastError());
#else
    shim::launch(op, kernel, grid, block, shared, P(std::forward<A>(args))...);
#endif
  }

  const char* op;
  int multiprocessors = 2, shared_limit = 227 * 1024;  // bytes of a block; what the shim says
#if defined(__CUDACC__)
  cudaStream_t stream = nullptr;
#endif

 private:
#if defined(__CUDACC__)
  enum class Access { in, inout, out, scratch };
  void permit(const void*, const Tensor&, Access) const {}
  void check(cudaError_t error) const {
    if (error != cudaSuccess) cudaGetLastError();  // reported here: the next launch must not find it again
    ATST_CHECK(error == cudaSuccess, op,
               ": its kernel could not be launched (or an earlier one failed): ", cudaGetErrorString(error));
  }
  using Guard = torch::stable::accelerator::DeviceGuard;
#else
  using Access = shim::Access;
  void permit(const void* p, const Tensor& t, Access access) const {
    shim::permit(p, static_cast<size_t>(t.numel()) * t.element_size(), access);
  }
  using Guard = shim::OperatorCall;  // forgets the permitted memory when the operator ends, and reports what it found
#endif
  int32_t device_;
  Guard guard_;
};

}  // namespace atst
