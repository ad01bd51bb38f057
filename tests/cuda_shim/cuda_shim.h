// What csrc/device.cuh includes where a C++ compiler builds the kernels: the CUDA names that kernels use, as C++ that
// runs on the CPU. Blocks run one after another, the threads of a block as fibers (scheduler.cpp), and every load and
// store of a kernel is checked (memory.cpp): the kernels are compiled with the calls of -fsanitize=thread, which
// runtime.so answers instead of the sanitizer's library.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

#define SHIM_EXPORT __attribute__((visibility("default")))

#include "shim_types.h"

namespace shim {

// Where in the source a primitive is called: a default argument of each, so that reports name the line of the kernel.
struct Site {
  const char* file;
  int line;
  constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
  friend bool operator==(const Site&, const Site&) = default;
};

enum class Access { in, inout, out, scratch };

// The indices of the running thread do not change while it runs, hence const: they are kept in registers.
SHIM_EXPORT uint3 thread_index() __attribute__((const));
SHIM_EXPORT uint3 block_index() __attribute__((const));
SHIM_EXPORT uint3 block_dim() __attribute__((const));
SHIM_EXPORT uint3 grid_dim() __attribute__((const));
SHIM_EXPORT void* shared_memory() __attribute__((const));

SHIM_EXPORT void permit(const void* p, size_t bytes, Access access);
SHIM_EXPORT void zero(void* p, size_t bytes);

// One call of an operator. Its end forgets the permitted memory and throws what was found.
class SHIM_EXPORT OperatorCall {
 public:
  explicit OperatorCall(int32_t device);
  ~OperatorCall() noexcept(false);
  OperatorCall(const OperatorCall&) = delete;
  OperatorCall& operator=(const OperatorCall&) = delete;

 private:
  int exceptions_;
};

struct Argument {
  const void* p;
  size_t bytes;
};
struct Launch {
  const char* op;
  void* kernel;
  dim3 grid, block;
  size_t shared;
  void (*call)(void* bound);
  void* bound;  // the kernel and its arguments, which threads may read
  size_t bound_bytes;
  const Argument* arguments;
  size_t argument_count;
};
SHIM_EXPORT void run(const Launch& launch);

template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A&&... args) {
  struct Bound {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } bound{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  const auto call = [](void* p) {
    const Bound& b = *static_cast<const Bound*>(p);
    std::apply(b.kernel, b.arguments);
  };
  const auto list = [](const P&... p) { return std::array<Argument, sizeof...(P)>{Argument{&p, sizeof(p)}...}; };
  const auto arguments = std::apply(list, bound.arguments);
  run({op, reinterpret_cast<void*>(kernel), grid, block, shared, call, &bound, sizeof(bound), arguments.data(),
       arguments.size()});
}

}  // namespace shim

#define threadIdx (shim::thread_index())
#define blockIdx (shim::block_index())
#define blockDim (shim::block_dim())
#define gridDim (shim::grid_dim())
constexpr int warpSize = 32;

#include "shim_half.h"
#include "shim_math.h"
#include "shim_memory.h"
#include "shim_warp.h"
