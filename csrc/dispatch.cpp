#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace atst {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return chosen().load(std::memory_order_relaxed); }

bool force_isa(const char* name) {
  if (!*name) {
    chosen() = best_isa();
    return true;
  }
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (!std::strcmp(name, isa_name(isa)) && isa <= best_isa()) {
      chosen() = isa;
      return true;
    }
  }
  return false;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace atst
