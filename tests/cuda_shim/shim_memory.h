// Atomics, fences and the loads and stores with a cache hint.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

namespace shim {

enum class Load { plain, coherent, constant };  // __ldca and __ldcs; __ldcg; __ldg
SHIM_EXPORT void check_load(const void* p, size_t bytes, Load kind, Site site);
SHIM_EXPORT void check_store(void* p, size_t bytes, Site site);
SHIM_EXPORT void check_atomic(void* p, size_t bytes, Site site);
SHIM_EXPORT void fence(bool device, Site site);

// The checks above stand for the access itself, which is then made where nothing is instrumented.
SHIM_EXPORT void copy(void* to, const void* from, size_t bytes);

template <class T>
T load(const T* p, Load kind, Site site) {
  static_assert(sizeof(T) <= 16 && std::has_single_bit(sizeof(T)), "CUDA loads no such type");
  check_load(p, sizeof(T), kind, site);
  T value;
  copy(&value, p, sizeof(T));
  return value;
}
template <class T>
void store(T* p, const T& value, Site site) {
  static_assert(sizeof(T) <= 16 && std::has_single_bit(sizeof(T)), "CUDA stores no such type");
  check_store(p, sizeof(T), site);
  copy(p, &value, sizeof(T));
}
template <class T, class F>
T atomic(T* p, Site site, F next) {
  check_atomic(p, sizeof(T), site);
  T before;
  copy(&before, p, sizeof(T));
  const T after = next(before);
  copy(p, &after, sizeof(T));
  return before;
}

}  // namespace shim

// The second argument is only there to be deduced from the first: atomicAdd(float*, 1) is an addition of floats.
#define SHIM_ATOMIC(name, condition, expression)                          \
  template <class T>                                                      \
  T name(T* p, std::type_identity_t<T> v, shim::Site site = {})           \
    requires(condition)                                                   \
  {                                                                       \
    return shim::atomic(p, site, [v](T old) -> T { return expression; }); \
  }
namespace shim {
template <class T, class... U>
constexpr bool one_of = (std::is_same_v<T, U> || ...);
template <class T>
constexpr bool unsigned_word = one_of<T, unsigned, unsigned long long>;
template <class T>
constexpr bool any_word = unsigned_word<T> || one_of<T, int>;
}  // namespace shim
SHIM_ATOMIC(atomicAdd, (shim::any_word<T> || shim::one_of<T, float, double>), old + v)
SHIM_ATOMIC(atomicSub, (shim::one_of<T, int, unsigned>), old - v)
SHIM_ATOMIC(atomicExch, (shim::any_word<T> || shim::one_of<T, float>), (static_cast<void>(old), v))
SHIM_ATOMIC(atomicMax, (shim::any_word<T> || shim::one_of<T, long long>), old < v ? v : old)
SHIM_ATOMIC(atomicMin, (shim::any_word<T> || shim::one_of<T, long long>), v < old ? v : old)
SHIM_ATOMIC(atomicAnd, shim::any_word<T>, old& v)
SHIM_ATOMIC(atomicOr, shim::any_word<T>, old | v)
SHIM_ATOMIC(atomicXor, shim::any_word<T>, old ^ v)
SHIM_ATOMIC(atomicInc, (shim::one_of<T, unsigned>), old >= v ? 0 : old + 1)
SHIM_ATOMIC(atomicDec, (shim::one_of<T, unsigned>), old == 0 || old > v ? v : old - 1)
#undef SHIM_ATOMIC

template <class T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> v, shim::Site site = {})
  requires(shim::any_word<T> || shim::one_of<T, unsigned short>)
{
  return shim::atomic(p, site, [=](T old) { return old == compare ? v : old; });
}

inline void __threadfence(shim::Site site = {}) { shim::fence(true, site); }
inline void __threadfence_block(shim::Site site = {}) { shim::fence(false, site); }

template <class T>
T __ldg(const T* p, shim::Site site = {}) {
  return shim::load(p, shim::Load::constant, site);
}
template <class T>
T __ldcg(const T* p, shim::Site site = {}) {
  return shim::load(p, shim::Load::coherent, site);
}
template <class T>
T __ldca(const T* p, shim::Site site = {}) {
  return shim::load(p, shim::Load::plain, site);
}
template <class T>
T __ldcs(const T* p, shim::Site site = {}) {
  return shim::load(p, shim::Load::plain, site);
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> v, shim::Site site = {}) {
  shim::store(p, v, site);
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> v, shim::Site site = {}) {
  shim::store(p, v, site);
}
template <class T>
void __stwt(T* p, std::type_identity_t<T> v, shim::Site site = {}) {
  shim::store(p, v, site);
}
template <class T>
void __stwb(T* p, std::type_identity_t<T> v, shim::Site site = {}) {
  shim::store(p, v, site);
}
