// Warp collectives: a lane waits until all lanes of its mask are at the same one, the last to come works out what each
// of them gets.
#include <algorithm>

#include "machine.h"

namespace shim {

namespace {
Thread* lanes_of_warp() { return machine.thread + running->warp * kLanes; }

bool same(const Thread& a, const Thread& b) {
  return a.state == State::at_collective && a.kind == b.kind && a.mask == b.mask && a.site == b.site;
}

template <class F>
void for_lanes(unsigned mask, F f) {
  for (; mask; mask &= mask - 1) f(static_cast<unsigned>(__builtin_ctz(mask)));
}

uint64_t combine(Collective kind, uint64_t a, uint64_t b) {
  const auto signed_a = static_cast<int64_t>(a), signed_b = static_cast<int64_t>(b);
  switch (kind) {
    case Collective::add:
      return a + b;
    case Collective::min_signed:
      return signed_a < signed_b ? a : b;
    case Collective::max_signed:
      return signed_a > signed_b ? a : b;
    case Collective::min_unsigned:
      return std::min(a, b);
    case Collective::max_unsigned:
      return std::max(a, b);
    case Collective::bit_and:
      return a & b;
    case Collective::bit_or:
      return a | b;
    default:
      return a ^ b;
  }
}

void set_results(Thread* lane, Collective kind, unsigned mask) {
  if (kind == Collective::sync) return;
  if (kind == Collective::shuffle) {
    for_lanes(mask, [&](unsigned i) { lane[i].result = lane[lane[i].source].value; });
    return;
  }
  if (kind == Collective::match) {
    for_lanes(mask, [&](unsigned i) {
      lane[i].result = 0;
      for_lanes(mask, [&](unsigned j) { lane[i].result |= uint64_t(lane[i].value == lane[j].value) << j; });
    });
    return;
  }
  uint64_t all = lane[__builtin_ctz(mask)].value;
  if (kind == Collective::ballot) {
    all = 0;
    for_lanes(mask, [&](unsigned i) { all |= lane[i].value << i; });
  } else {
    for_lanes(mask & (mask - 1), [&](unsigned i) { all = combine(kind, all, lane[i].value); });
  }
  for_lanes(mask, [&](unsigned i) { lane[i].result = all; });
}

// What one lane of the mask knew to be over, now all of them know, and what they did themselves.
void share_knowledge(Warp& w, unsigned mask) {
  const uint32_t now = ++w.counter;
  uint32_t known[kLanes] = {};
  for_lanes(mask, [&](unsigned i) {
    for (unsigned u = 0; u < kLanes; ++u) known[u] = std::max(known[u], w.seen[i][u]);
  });
  for_lanes(mask, [&](unsigned i) { known[i] = w.clock[i] = now; });
  for_lanes(mask, [&](unsigned i) { std::copy_n(known, kLanes, w.seen[i]); });
}

void check_mask(Collective kind, unsigned mask, unsigned source, Site site) {
  const unsigned lane = running->lane, base = running->linear - lane;
  const unsigned existing = machine.threads - base >= kLanes ? ~0u : (1u << (machine.threads - base)) - 1;
  if (!(mask >> lane & 1)) fatal(site, format("lane %u calls a warp collective for the lanes %#x", lane, mask));
  if (mask & ~existing)
    fatal(site, format("waits for the lanes %#x, but the block has only the lanes %#x of the warp", mask, existing));
  if (kind == Collective::shuffle && (source >= kLanes || !(mask >> source & 1)))
    fatal(site, format("shuffles the value of lane %u, which is not in the mask %#x", source, mask));
}
}  // namespace

uint64_t collective(Collective kind, unsigned mask, uint64_t value, unsigned source, Site site) {
  check_mask(kind, mask, source, site);
  Thread& t = *running;
  t.state = State::at_collective;
  t.kind = kind, t.mask = mask, t.value = value, t.source = source, t.site = site;
  Thread* const lane = lanes_of_warp();
  for (unsigned others = mask; others; others &= others - 1) {
    if (same(lane[__builtin_ctz(others)], t)) continue;
    leave();
    return t.result;
  }
  set_results(lane, kind, mask);
  share_knowledge(machine.warp[t.warp], mask);
  for_lanes(mask, [&](unsigned i) { lane[i].state = State::ready; });
  return t.result;
}

unsigned lane() { return running->lane; }

unsigned alive_lanes() {
  const unsigned base = running->linear - running->lane;
  unsigned mask = 0;
  for (unsigned i = 0; i < kLanes && base + i < machine.threads; ++i)
    mask |= unsigned(machine.thread[base + i].state != State::returned) << i;
  return mask;
}

}  // namespace shim
