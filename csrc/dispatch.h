// Which instruction set runs, decided once per process, and how a kernel is declared for all of them.
#pragma once

namespace atst {

enum class Isa { portable, avx2, avx512 };

Isa best_isa();               // the widest one that this processor has and this build contains
Isa active_isa();             // best_isa(), unless force_isa chose another
bool force_isa(const char*);  // for tests and benchmarks; false where this machine cannot run it ("" returns to best)
const char* isa_name(Isa);

}  // namespace atst

// ATST_DECLARE_SIMD(void, name, (args)): the same function in one namespace per instruction set.
// ATST_SELECT_SIMD(name): a pointer to the one that runs here.
#if defined(__x86_64__)
#  define ATST_DECLARE_SIMD(ret, name, args) \
    namespace portable {                     \
    ret name args;                           \
    }                                        \
    namespace avx2 {                         \
    ret name args;                           \
    }                                        \
    namespace avx512 {                       \
    ret name args;                           \
    }
#  define ATST_SELECT_SIMD(name)                                \
    (::atst::active_isa() == ::atst::Isa::avx512 ? avx512::name \
     : ::atst::active_isa() == ::atst::Isa::avx2 ? avx2::name   \
                                                 : portable::name)
#else
#  define ATST_DECLARE_SIMD(ret, name, args) \
    namespace portable {                     \
    ret name args;                           \
    }
#  define ATST_SELECT_SIMD(name) (portable::name)
#endif
