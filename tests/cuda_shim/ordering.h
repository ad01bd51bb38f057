// Which accesses are over before which: what makes two accesses to the same byte a race.
#pragma once

#include "shadow.h"

namespace shim {

inline bool writes(Kind k) { return k == Kind::write || k == Kind::atomic; }
inline uint32_t stamp() { return machine.warp[running->warp].clock[running->lane]; }

// Are all accesses of a side over before what the running thread does now? In one block only: by a barrier, or by warp
// collectives if they were made in the same warp.
inline bool ordered(const Side& s) {
  if (s.epoch < machine.epoch) return true;
  if (s.more_warps || s.warp != running->warp) return false;
  const auto& seen = machine.warp[running->warp].seen[running->lane];
  for (uint32_t others = s.lanes & ~(1u << running->lane); others; others &= others - 1)
    if (s.stamp >= seen[__builtin_ctz(others)]) return false;
  return true;
}

// Adds an access of the running thread. oldest: the first epoch whose accesses matter.
inline void add(Side& s, uint32_t oldest) {
  const uint32_t bit = 1u << running->lane, now = stamp();
  if (s.epoch == machine.epoch) {
    const bool same_warp = s.warp == running->warp;
    if (same_warp && (s.stamp == now || !ordered(s))) {
      s.lanes |= bit, s.stamp = now;
      return;
    }
    s.more_warps |= !same_warp;
    s.warp = static_cast<uint8_t>(running->warp), s.lanes = bit, s.stamp = now;
    return;
  }
  const bool more_blocks = s.epoch >= oldest && (s.epoch < machine.block_epoch || s.more_blocks);
  s = {machine.epoch, now, bit, static_cast<uint8_t>(running->warp), false, more_blocks};
}

enum class Wrong { nothing, race, constant, other_block, other_block_unordered };
// What is wrong between an access of the running thread and earlier ones. atomics: what those are.
Wrong wrong(const Side& s, bool atomics, Kind kind);

// What is wrong with an access to a cell, and with which side of it.
inline Wrong wrong(const Cell& c, Kind kind, uint32_t oldest, const Side*& with) {
  Wrong w = Wrong::nothing;
  if (c.written.epoch >= oldest && (w = wrong(c.written, false, kind)) != Wrong::nothing)
    with = &c.written;
  else if (c.atomics.epoch >= oldest && kind != Kind::atomic && (w = wrong(c.atomics, true, kind)) != Wrong::nothing)
    with = &c.atomics;
  else if (c.read.epoch >= oldest && writes(kind) && (w = wrong(c.read, false, kind)) != Wrong::nothing)
    with = &c.read;
  return w;
}

// What follows "reads 4 bytes of something".
std::string explain(Wrong w, const Side& s, bool written);

// Between blocks: a fence after the writes and then an atomic there, an atomic and then a fence here.
void begin_launch_ordering();
void begin_block_ordering();
void note_fence();
void note_atomic();

}  // namespace shim
