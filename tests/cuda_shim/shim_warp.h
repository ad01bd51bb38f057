// Barriers and warp collectives.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

namespace shim {

enum class Collective : uint8_t {
  sync,
  shuffle,
  ballot,
  match,
  add,
  min_signed,
  min_unsigned,
  max_signed,
  max_unsigned,
  bit_and,
  bit_or,
  bit_xor
};

// Waits for all threads of the block; the number of them whose argument is true.
SHIM_EXPORT unsigned block_barrier(bool predicate, Site site);
// Waits for the lanes of the mask. source: the lane whose value a shuffle takes.
SHIM_EXPORT uint64_t collective(Collective kind, unsigned mask, uint64_t value, unsigned source, Site site);
SHIM_EXPORT unsigned lane() __attribute__((const));
SHIM_EXPORT unsigned alive_lanes();

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double, __half,
                       __half2, __nv_bfloat16, __nv_bfloat162>,
                "CUDA shuffles no such type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(Collective::shuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline unsigned segment(int width) { return lane() & ~(static_cast<unsigned>(width) - 1); }

}  // namespace shim

inline void __syncthreads(shim::Site site = {}) { shim::block_barrier(false, site); }
inline int __syncthreads_count(int predicate, shim::Site site = {}) {
  return static_cast<int>(shim::block_barrier(predicate != 0, site));
}
inline int __syncthreads_or(int predicate, shim::Site site = {}) {
  return shim::block_barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, shim::Site site = {}) {
  return shim::block_barrier(predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, shim::Site site = {}) {
  shim::collective(shim::Collective::sync, mask, 0, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, shim::Site site = {}) {
  const unsigned from = shim::segment(width) + (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1));
  return shim::shuffle(mask, value, from, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, shim::Site site = {}) {
  const unsigned lane = shim::lane();
  return shim::shuffle(mask, value, lane - shim::segment(width) < delta ? lane : lane - delta, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, shim::Site site = {}) {
  const unsigned lane = shim::lane(), from = lane + delta;
  return shim::shuffle(mask, value, from < shim::segment(width) + static_cast<unsigned>(width) ? from : lane, site);
}
// As on the GPU a lane may read from an earlier segment, not from a later one.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, shim::Site site = {}) {
  const unsigned lane = shim::lane(), from = lane ^ static_cast<unsigned>(lane_mask);
  return shim::shuffle(mask, value, from < shim::segment(width) + static_cast<unsigned>(width) ? from : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, shim::Site site = {}) {
  return static_cast<unsigned>(shim::collective(shim::Collective::ballot, mask, predicate != 0, 0, site));
}
inline int __any_sync(unsigned mask, int predicate, shim::Site site = {}) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, shim::Site site = {}) {
  return __ballot_sync(mask, predicate == 0, site) == 0;
}
// Which lanes run together is up to the GPU; here it is those that have not returned.
inline unsigned __activemask() { return shim::alive_lanes(); }

template <class T>
unsigned __match_any_sync(unsigned mask, T value, shim::Site site = {}) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(shim::collective(shim::Collective::match, mask, bits, 0, site));
}

#define SHIM_REDUCE(name, T, kind)                                                                                    \
  inline T name(unsigned mask, T value, shim::Site site = {}) {                                                       \
    return static_cast<T>(                                                                                            \
        shim::collective(shim::Collective::kind, mask, static_cast<uint64_t>(static_cast<int64_t>(value)), 0, site)); \
  }
SHIM_REDUCE(__reduce_add_sync, unsigned, add)
SHIM_REDUCE(__reduce_add_sync, int, add)
SHIM_REDUCE(__reduce_min_sync, unsigned, min_unsigned)
SHIM_REDUCE(__reduce_min_sync, int, min_signed)
SHIM_REDUCE(__reduce_max_sync, unsigned, max_unsigned)
SHIM_REDUCE(__reduce_max_sync, int, max_signed)
SHIM_REDUCE(__reduce_and_sync, unsigned, bit_and)
SHIM_REDUCE(__reduce_or_sync, unsigned, bit_or)
SHIM_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef SHIM_REDUCE
