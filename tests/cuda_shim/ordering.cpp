#include "ordering.h"

#include <algorithm>

namespace shim {

namespace {
// The writes of a block that fences cover: those of epochs before `epoch`, and in it those that a thread made before
// its clock was at fenced[thread].
struct Release {
  uint32_t block_epoch, epoch = 0;
  std::vector<uint32_t> fenced;
};
std::vector<Release> releases;  // of the blocks of this launch, in the order in which they ran
Release fences;                 // of the running block, not yet followed by an atomic
bool new_fence = false;

// Something that a block has done: in which epoch first, and each thread in which epoch last, at which clock.
struct Event {
  uint32_t first = 0;
  struct {
    uint32_t epoch, stamp;
  } by[kMaxThreads];

  void note() {
    if (!first) first = machine.epoch;
    auto& mine = by[running->linear];
    if (mine.epoch != machine.epoch) mine = {machine.epoch, stamp()};
  }
  // Is one of them over before what the running thread does now?
  bool over() const {
    if (!first) return false;
    if (first < machine.epoch || by[running->linear].epoch == machine.epoch) return true;
    const auto* lane = by + running->warp * kLanes;
    const auto& seen = machine.warp[running->warp].seen[running->lane];
    for (unsigned u = 0; u < kLanes; ++u)
      if (lane[u].epoch == machine.epoch && lane[u].stamp < seen[u]) return true;
    return false;
  }
};
Event atomics_made;  // in global memory
Event acquired;      // fences that follow an atomic

bool released(const Side& s) {
  const auto after = std::upper_bound(releases.begin(), releases.end(), s.epoch,
                                      [](uint32_t epoch, const Release& r) { return epoch < r.block_epoch; });
  if (after == releases.begin()) return false;
  const Release& r = *std::prev(after);
  if (s.epoch != r.epoch) return s.epoch < r.epoch;
  for (uint32_t lanes = s.lanes; lanes; lanes &= lanes - 1)
    if (r.fenced[s.warp * kLanes + static_cast<unsigned>(__builtin_ctz(lanes))] <= s.stamp) return false;
  return true;
}

std::string names(const Side& s) {
  const uint32_t others = s.warp == running->warp ? s.lanes & ~(1u << running->lane) : s.lanes;
  if (!others) return "a thread of another warp";
  return thread_name(machine.thread[s.warp * kLanes + static_cast<unsigned>(__builtin_ctz(others))]);
}
}  // namespace

Wrong wrong(const Side& s, bool atomics, Kind kind) {
  if (s.epoch >= machine.block_epoch) {
    if (kind == Kind::constant_read) return Wrong::constant;
    if (!ordered(s)) return Wrong::race;
    if (!s.more_blocks) return Wrong::nothing;
  }
  if (kind == Kind::read || kind == Kind::constant_read) return Wrong::other_block;
  const bool over = acquired.over() && (atomics || s.more_blocks || released(s));
  return over ? Wrong::nothing : Wrong::other_block_unordered;
}

std::string explain(Wrong w, const Side& s, bool written) {
  if (w == Wrong::race)
    return format("that %s by %s, with no barrier between", written ? "were written" : "were read", names(s).c_str());
  if (w == Wrong::constant) return "that this launch wrote: __ldg is for what nobody writes";
  const std::string other = format("that another block of this launch %s, ", written ? "wrote" : "read");
  if (w == Wrong::other_block) return other + "not through __ldcg or an atomic";
  return other + "with no __threadfence and atomic there and atomic, __threadfence and barrier here between";
}

void begin_launch_ordering() { releases.clear(); }

void begin_block_ordering() {
  atomics_made.first = acquired.first = 0;
  fences = {machine.block_epoch, 0, {}};
  new_fence = false;
}

void note_fence() {
  if (fences.epoch != machine.epoch) fences.epoch = machine.epoch, fences.fenced.assign(machine.threads, 0);
  Warp& w = machine.warp[running->warp];
  uint32_t* fenced = fences.fenced.data() + running->warp * kLanes;
  const unsigned lanes = std::min(kLanes, machine.threads - running->warp * kLanes);
  for (unsigned u = 0; u < lanes; ++u) fenced[u] = std::max(fenced[u], w.seen[running->lane][u]);
  fenced[running->lane] = w.clock[running->lane] = ++w.counter;  // what follows is told from what was before
  new_fence = true;
  if (atomics_made.over()) acquired.note();
}

void note_atomic() {
  atomics_made.note();
  if (!new_fence) return;
  if (releases.empty() || releases.back().block_epoch != machine.block_epoch) releases.emplace_back();
  releases.back() = fences;
  new_fence = false;
}

}  // namespace shim
