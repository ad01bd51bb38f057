// Working memory of one thread, for the files <op>_cpu.cpp: aligned to a cache line, not initialised.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace atst {

struct FreeScratch {
  void operator()(float* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float, FreeScratch>;

inline Scratch allocate_scratch(int64_t floats) {
  const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
  float* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!p) std::abort();  // inside a parallel region nothing may throw, and there is nothing to go on with
  return Scratch(p);
}

}  // namespace atst
