// Every access of a kernel: which memory it touches, and whether it may.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstring>

#include "shadow.h"

namespace shim {

namespace {
constexpr uint64_t kEndless = 300'000'000;  // accesses of one thread before it is said to wait for something in a loop
constexpr size_t kWindow = 512 * 1024;      // addresses around the shared memory that are told to be misses of it
constexpr size_t kBefore = 64 * 1024;
constexpr uint32_t kHost = 1;

struct Range {
  uintptr_t start;
  size_t bytes;
  Access access;
  int number;
  Shadow shadow;
};
std::vector<Range> ranges;  // by address, disjoint
size_t last_range = 0;
int given = 0;
Shadow shared_shadow(kMaxShared);

// What blocks did that lets a later one read what they wrote: a fence after the writes, then an atomic.
struct Release {
  uint32_t block_epoch, fence, released;
};
std::vector<Release> releases;
uint32_t acquired;  // the epoch of the block's first atomic; 0: none yet
unsigned acquired_by;

const char* name(Access a) {
  constexpr const char* names[] = {"in", "inout", "out", "scratch"};
  return names[static_cast<int>(a)];
}
std::string describe(const Range& r) { return format("pointer %d (%s, %zu bytes)", r.number, name(r.access), r.bytes); }
const char* verb(Kind k) { return k == Kind::write ? "writes" : k == Kind::atomic ? "atomically changes" : "reads"; }
bool writes(Kind k) { return k == Kind::write || k == Kind::atomic; }

std::string names(const Side& s) {
  const unsigned linear = s.warp * kLanes + static_cast<unsigned>(__builtin_ctz(s.lanes));
  return thread_name(machine.thread[linear]);
}

// Are all accesses of a side over before what the running thread does now? In one block only: by a barrier, or by warp
// collectives if they were made in the same warp.
bool ordered(const Side& s) {
  if (s.epoch < machine.epoch) return true;
  const unsigned warp = running->linear / kLanes, lane = running->linear % kLanes;
  if (s.more_warps || s.warp != warp) return false;
  const auto& seen = machine.warp[warp].seen[lane];
  for (uint32_t others = s.lanes & ~(1u << lane); others; others &= others - 1)
    if (s.stamp >= seen[__builtin_ctz(others)]) return false;
  return true;
}

// The same for accesses of another block of this launch: it made them, a fence and then an atomic, and this block has
// made an atomic since, in this thread or before a barrier.
bool ordered_between_blocks(const Side& s) {
  if (!acquired || (acquired == machine.epoch && acquired_by != running->linear)) return false;
  if (s.atomic || s.more_blocks) return true;
  const auto after = std::upper_bound(releases.begin(), releases.end(), s.epoch,
                                      [](uint32_t epoch, const Release& r) { return epoch < r.block_epoch; });
  return after != releases.begin() && s.epoch <= std::prev(after)->released;
}

void add(Side& s, bool atomic, uint32_t oldest) {
  const unsigned warp = running->linear / kLanes;
  const uint32_t lane = 1u << running->linear % kLanes, stamp = machine.warp[warp].clock[running->linear % kLanes];
  if (s.epoch == machine.epoch && s.atomic == atomic) {
    if (s.warp == warp && s.stamp == stamp) {
      s.lanes |= lane;
      return;
    }
    if (s.warp != warp)
      s.more_warps = true;
    else if (!ordered(s)) {
      s.lanes |= lane, s.stamp = stamp;
      return;
    }
    s.warp = static_cast<uint8_t>(warp), s.lanes = lane, s.stamp = stamp;
    return;
  }
  const bool blocks = s.epoch >= oldest && (s.epoch < machine.block_epoch || s.more_blocks);
  s = {machine.epoch, stamp, lane, static_cast<uint8_t>(warp), false, blocks, atomic};
}

// One access to one cell. Returns what is wrong with it, or null.
const char* conflict(const Side& s, bool write_before, Kind kind) {
  if (s.epoch < machine.launch_epoch || (s.atomic && kind == Kind::atomic)) return nullptr;
  if (s.epoch >= machine.block_epoch) {
    if (kind == Kind::constant_read) return "that was written in this launch: __ldg reads only what nobody writes";
    if (!ordered(s)) return write_before ? "that was written" : "that was read";
    if (!s.more_blocks) return nullptr;
  }
  if (kind == Kind::read || kind == Kind::constant_read) return "that another block of this launch wrote";
  if (ordered_between_blocks(s)) return nullptr;
  return write_before ? "that another block of this launch wrote" : "that another block of this launch reads";
}

void conflict_message(const Side& s, const char* why, Kind kind, size_t bytes, const std::string& where, Where at) {
  std::string what = format("%s %zu bytes of %s %s", verb(kind), bytes, where.c_str(), why);
  if (s.epoch >= machine.block_epoch && kind != Kind::constant_read)
    what += " by " + names(s) + " with no barrier between";
  else if (kind == Kind::read && s.epoch < machine.block_epoch)
    what += ", not through __ldcg or an atomic";
  else if (kind != Kind::constant_read)
    what += ", without __threadfence and an atomic there, and an atomic and a barrier here, between";
  report(at, what);
}

// What is wrong with an access to one cell, in words, or null. oldest: the first epoch whose accesses matter.
const char* conflict(const Cell& c, Kind kind, uint32_t oldest, const Side** with) {
  if (c.written.epoch >= oldest) {
    *with = &c.written;
    if (const char* why = conflict(c.written, true, kind)) return why;
  }
  if (!writes(kind) || c.read.epoch < oldest) return nullptr;
  *with = &c.read;
  return conflict(c.read, false, kind);
}

// written: the epoch since which the memory must have been written
template <class Describe>
void check_cells(Shadow& shadow, size_t offset, size_t bytes, Kind kind, uint32_t written, uint32_t oldest, Where at,
                 Describe describe) {
  Cell* const first = shadow.at(offset, bytes);
  const size_t unit = shadow.unit();
  bool told = false;
  for (Cell *c = first, *end = first + (bytes + unit - 1) / unit; c != end; ++c) {
    const Side* with = nullptr;
    if (told) {
    } else if (kind != Kind::write && c->written.epoch < written) {
      report(at, format("%s %zu bytes of %s that nobody wrote", verb(kind), bytes, describe().c_str()));
      told = true;
    } else if (const char* why = conflict(*c, kind, oldest, &with)) {
      conflict_message(*with, why, kind, bytes, describe(), at);
      told = true;
    }
    if (writes(kind))
      add(c->written, kind == Kind::atomic, oldest);
    else
      add(c->read, false, oldest);
  }
}

Range* find(uintptr_t a) {
  if (last_range < ranges.size() && a - ranges[last_range].start < ranges[last_range].bytes) return &ranges[last_range];
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), a, [](uintptr_t x, const Range& r) { return x < r.start; });
  if (after == ranges.begin()) return nullptr;
  const auto r = std::prev(after);
  if (a - r->start >= r->bytes) return nullptr;
  last_range = static_cast<size_t>(r - ranges.begin());
  return &*r;
}

// The constants of the module that the kernel is in.
bool module_data(uintptr_t a) {
  Dl_info kernel, here;
  return dladdr(machine.launch->kernel, &kernel) && dladdr(reinterpret_cast<void*>(a), &here) &&
         kernel.dli_fbase == here.dli_fbase;
}

[[noreturn]] void outside(uintptr_t a, size_t bytes, Kind kind, Where at) {
  const std::string does = format("%s %zu bytes", verb(kind), bytes);
  const Range* nearest = nullptr;
  long long nearest_distance = 4096;
  for (const Range& r : ranges) {
    const auto past = static_cast<long long>(a + bytes - (r.start + r.bytes)),
               before = static_cast<long long>(r.start - a);
    const long long distance = a >= r.start ? past : before;
    if (distance > 0 && distance < nearest_distance) nearest = &r, nearest_distance = distance;
  }
  if (!nearest) fatal(at, does + " outside of all memory that the kernel was given");
  fatal(at, format("%s, %lld bytes %s %s", does.c_str(), nearest_distance,
                   a >= nearest->start ? "past the end of" : "before the start of", describe(*nearest).c_str()));
}

void global_access(uintptr_t a, size_t bytes, Kind kind, Where at) {
  Range* r = find(a);
  if (!r || a - r->start + bytes > r->bytes) {
    const uintptr_t bound = reinterpret_cast<uintptr_t>(machine.launch->bound);
    if (!writes(kind) && (a - bound < machine.launch->bound_bytes || (!r && module_data(a)))) return;
    outside(a, bytes, kind, at);
  }
  if (r->access == Access::in) {
    if (writes(kind)) fatal(at, format("%s %zu bytes of %s", verb(kind), bytes, describe(*r).c_str()));
    return;
  }
  check_cells(r->shadow, a - r->start, bytes, kind, r->access == Access::inout ? 0 : kHost, machine.launch_epoch, at,
              [&] { return format("%s at %zu", describe(*r).c_str(), static_cast<size_t>(a - r->start)); });
  if (kind == Kind::atomic) {
    Release& mine = releases.back();
    if (mine.fence) mine.released = mine.fence;
    if (!acquired) acquired = machine.epoch, acquired_by = running->linear;
  }
}
}  // namespace

void access(const void* p, size_t bytes, Kind kind, Where at) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (++running->accesses == kEndless) fatal(at, "does not end: waits for another thread or block in a loop?");
  const uintptr_t shared = a - reinterpret_cast<uintptr_t>(machine.shared);
  if (shared + kBefore < kWindow) {
    if (shared + bytes > machine.launch->shared || shared > machine.launch->shared)
      fatal(at, format("%s %zu bytes of shared memory at %lld, outside of its %zu bytes", verb(kind), bytes,
                       static_cast<long long>(shared), machine.launch->shared));
    check_cells(shared_shadow, shared, bytes, kind, machine.block_epoch, machine.block_epoch, at,
                [&] { return format("shared memory at %zu", static_cast<size_t>(shared)); });
    return;
  }
  if (a - running->stack < kStack) return;
  global_access(a, bytes, kind, at);
}

void begin_block_memory() {
  acquired = 0;
  releases.push_back({machine.block_epoch, 0, 0});
  std::memset(machine.shared, 0xff, machine.launch->shared);  // NaN
}

void begin_launch_memory() {
  releases.clear();
  if (machine.shared) return;
  void* p = nullptr;
  if (posix_memalign(&p, 4096, kWindow)) throw std::bad_alloc();
  machine.shared = static_cast<unsigned char*>(p) + kBefore;
}

void note_fence() { releases.back().fence = machine.epoch; }

void permit(const void* p, size_t bytes, Access access) {
  ++given;
  if (!bytes) return;
  auto start = reinterpret_cast<uintptr_t>(p);
  for (auto r = ranges.begin(); r != ranges.end();) {
    if (start + bytes <= r->start || r->start + r->bytes <= start) {
      ++r;
      continue;
    }
    const bool same = r->start == start && r->bytes == bytes;
    if (same && (access == Access::in || access == r->access)) return;
    if (same && r->access == Access::in) {
      r->access = access;
      return;
    }
    if (access != Access::in || r->access != Access::in)
      throw std::runtime_error(
          format("pointer %d (%s, %zu bytes) overlaps %s", given, name(access), bytes, describe(*r).c_str()));
    const uintptr_t end = std::max(start + bytes, r->start + r->bytes);
    start = std::min(start, r->start), bytes = end - start;
    r = ranges.erase(r);
  }
  const auto at = std::find_if(ranges.begin(), ranges.end(), [&](const Range& r) { return r.start > start; });
  ranges.insert(at, {start, bytes, access, given, Shadow(bytes)});
}

void zero(void* p, size_t bytes) {
  if (!bytes) return;
  const auto a = reinterpret_cast<uintptr_t>(p);
  Range* r = find(a);
  if (!r || r->access == Access::in || a - r->start + bytes > r->bytes)
    throw std::runtime_error("zero(): not memory that a kernel may write");
  std::memset(p, 0, bytes);
  Cell* c = r->shadow.at(a - r->start, bytes);
  for (size_t n = (bytes + r->shadow.unit() - 1) / r->shadow.unit(); n; --n, ++c) c->written = {kHost};
}

void forget_memory(bool check_outputs) {
  for (Range& r : ranges) {
    if (!check_outputs || r.access != Access::out) continue;
    Cell* c = r.shadow.at(0, r.bytes);
    size_t missing = 0, first = 0;
    for (size_t i = r.shadow.count(); i-- > 0;)
      if (!c[i].written.epoch) ++missing, first = i;
    if (missing)
      report(Where(), format("%zu bytes of %s were never written, the first at %zu", missing * r.shadow.unit(),
                             describe(r).c_str(), first * r.shadow.unit()));
  }
  ranges.clear();
  given = 0;
}

bool memory_left() { return !ranges.empty(); }

}  // namespace shim
