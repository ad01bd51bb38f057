// What the compiler puts before each load and store of instrumented code (-fsanitize=thread) and at misaligned pointers
// (-fsanitize=alignment). Host code of the operators calls these too, and is not looked at.
#include <atomic>
#include <cstring>

#include "ordering.h"

namespace shim {

namespace {
void seen(const void* p, size_t bytes, Kind kind, const void* caller) {
  if (running) access(p, bytes, kind, caller);
}
void seen_copy(void* to, const void* from, size_t bytes, const void* caller) {
  if (!bytes) return;
  seen(from, bytes, Kind::read, caller);
  seen(to, bytes, Kind::write, caller);
}
void aligned(const void* p, size_t bytes, Site site) {
  if (running && reinterpret_cast<uintptr_t>(p) % bytes)
    fatal(site, format("accesses %zu bytes at an address that is not a multiple of %zu", bytes, bytes));
}
template <class Place>
void undefined(const Place& where, std::string what) {
  if (running) fatal(Site(where.file, static_cast<int>(where.line)), std::move(what));
}
}  // namespace

void check_load(const void* p, size_t bytes, Load load, Site site) {
  aligned(p, bytes, site);
  const Kind kinds[] = {Kind::read, Kind::coherent_read, Kind::constant_read};
  access(p, bytes, kinds[static_cast<int>(load)], nullptr, &site);
}
void check_store(void* p, size_t bytes, Site site) {
  aligned(p, bytes, site);
  access(p, bytes, Kind::write, nullptr, &site);
}
void check_atomic(void* p, size_t bytes, Site site) {
  aligned(p, bytes, site);
  access(p, bytes, Kind::atomic, nullptr, &site);
}
void fence(bool device, Site) {
  if (device) note_fence();
}
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

}  // namespace shim

extern "C" {

#define CALLER __builtin_return_address(0)
#define SHIM_SIZE(n)                                                                                                   \
  SHIM_EXPORT void __tsan_read##n(void* p) { shim::seen(p, n, shim::Kind::read, CALLER); }                             \
  SHIM_EXPORT void __tsan_write##n(void* p) { shim::seen(p, n, shim::Kind::write, CALLER); }                           \
  SHIM_EXPORT void __tsan_unaligned_read##n(void* p) { shim::seen(p, n, shim::Kind::read, CALLER); }                   \
  SHIM_EXPORT void __tsan_unaligned_write##n(void* p) { shim::seen(p, n, shim::Kind::write, CALLER); }                 \
  SHIM_EXPORT void __tsan_volatile_read##n(void* p) { shim::seen(p, n, shim::Kind::coherent_read, CALLER); }           \
  SHIM_EXPORT void __tsan_volatile_write##n(void* p) { shim::seen(p, n, shim::Kind::write, CALLER); }                  \
  SHIM_EXPORT void __tsan_unaligned_volatile_read##n(void* p) { shim::seen(p, n, shim::Kind::coherent_read, CALLER); } \
  SHIM_EXPORT void __tsan_unaligned_volatile_write##n(void* p) { shim::seen(p, n, shim::Kind::write, CALLER); }
SHIM_SIZE(1)
SHIM_SIZE(2)
SHIM_SIZE(4)
SHIM_SIZE(8)
SHIM_SIZE(16)
SHIM_EXPORT void __tsan_read_range(void* p, size_t n) { shim::seen(p, n, shim::Kind::read, CALLER); }
SHIM_EXPORT void __tsan_write_range(void* p, size_t n) { shim::seen(p, n, shim::Kind::write, CALLER); }
SHIM_EXPORT void __tsan_init() {}
SHIM_EXPORT void __tsan_func_entry(void*) {}
SHIM_EXPORT void __tsan_func_exit() {}
SHIM_EXPORT void __tsan_vptr_update(void**, void*) {}
SHIM_EXPORT void __tsan_vptr_read(void**) {}

// Atomics of the host code, as the compiler would have made them without the sanitizer.
#define SHIM_ATOMICS(bits, T)                                                                                         \
  SHIM_EXPORT T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  SHIM_EXPORT void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  SHIM_EXPORT T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                                             \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                   \
  SHIM_EXPORT T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                   \
  SHIM_EXPORT T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                   \
  SHIM_EXPORT T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                   \
  SHIM_EXPORT T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) {                                             \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                                   \
  SHIM_EXPORT int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* c, T v, int, int) {                 \
    return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }                                                                                                                   \
  SHIM_EXPORT int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* c, T v, int, int) {                   \
    return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }
SHIM_ATOMICS(8, unsigned char)
SHIM_ATOMICS(16, unsigned short)
SHIM_ATOMICS(32, unsigned)
SHIM_ATOMICS(64, unsigned long)
SHIM_EXPORT void __tsan_atomic_thread_fence(int) { std::atomic_thread_fence(std::memory_order_seq_cst); }
SHIM_EXPORT void __tsan_atomic_signal_fence(int) { std::atomic_signal_fence(std::memory_order_seq_cst); }

// Every report of -fsanitize=undefined starts with its place in the source.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourceLocation where;
  const void* type;
  unsigned char log_alignment, check;
};
SHIM_EXPORT void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t) {
  shim::undefined(data->where, shim::format("accesses memory at an address that is not a multiple of %u, as the type "
                                            "there needs",
                                            1u << data->log_alignment));
}
#define SHIM_UNDEFINED(name, what) \
  SHIM_EXPORT void __ubsan_handle_##name(SourceLocation* where) { shim::undefined(*where, what); }
SHIM_UNDEFINED(out_of_bounds, "uses an index outside of an array")
SHIM_UNDEFINED(shift_out_of_bounds, "shifts by a number of bits that is negative or not less than those of the type")
SHIM_UNDEFINED(add_overflow, "adds integers whose sum does not fit")
SHIM_UNDEFINED(sub_overflow, "subtracts integers whose difference does not fit")
SHIM_UNDEFINED(mul_overflow, "multiplies integers whose product does not fit")
SHIM_UNDEFINED(negate_overflow, "negates the least integer")
SHIM_UNDEFINED(divrem_overflow, "divides an integer by zero, or the least one by -1")
SHIM_UNDEFINED(float_cast_overflow, "converts a float to an integer type that it does not fit")

void* __wrap_memcpy(void* to, const void* from, size_t bytes);
void* __wrap_memmove(void* to, const void* from, size_t bytes);
void* __wrap_memset(void* to, int value, size_t bytes);
SHIM_EXPORT void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  shim::seen_copy(to, from, bytes, CALLER);
  return std::memcpy(to, from, bytes);
}
SHIM_EXPORT void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  shim::seen_copy(to, from, bytes, CALLER);
  return std::memmove(to, from, bytes);
}
SHIM_EXPORT void* __wrap_memset(void* to, int value, size_t bytes) {
  if (bytes) shim::seen(to, bytes, shim::Kind::write, CALLER);
  return std::memset(to, value, bytes);
}
}
