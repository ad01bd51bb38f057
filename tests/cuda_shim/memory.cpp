// Every access of a kernel: which memory it touches, and whether it may.
#include <link.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "ordering.h"

namespace shim {

namespace {
constexpr uint64_t kEndless = 20'000'000;  // accesses of one thread before it is said to wait for something in a loop
constexpr size_t kWindow = 512 * 1024;     // addresses around the shared memory that are told to be misses of it
constexpr size_t kBefore = 64 * 1024;
constexpr uint32_t kHost = 1;  // the epoch of what the host wrote

struct Range {
  uintptr_t start;
  size_t bytes;
  Access access;
  size_t argument;  // which one of the latest kernel points to it, from 1; 0: none
  Shadow shadow;
};
std::vector<Range> ranges;  // by address, disjoint
size_t last_range = 0;
Shadow shared_shadow(kMaxShared);
uintptr_t module_start = 0, module_end = 0;  // of the library that the kernel is in

const char* name(Access a) {
  constexpr const char* names[] = {"in", "inout", "out", "scratch"};
  return names[static_cast<int>(a)];
}

std::string describe(const Range& r) {
  if (!r.argument) return format("memory (%s, %zu bytes)", name(r.access), r.bytes);
  return format("argument %zu (%s, %zu bytes)", r.argument, name(r.access), r.bytes);
}

std::string does(Kind k, size_t bytes) {
  const char* verb = k == Kind::write ? "writes" : k == Kind::atomic ? "atomically changes" : "reads";
  return format("%s %zu bytes", verb, bytes);
}

Where place(const void* caller, const Site* site) { return site ? Where(*site) : Where(caller); }

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

// written: the epoch since which the memory must have been written; oldest: the first one whose accesses matter.
// describe: names the memory. The first cell that something is wrong with is reported.
template <class Describe>
void check_cells(Cell* first, size_t n, size_t bytes, Kind kind, uint32_t written, uint32_t oldest, Where at,
                 Describe describe) {
  bool told = false;
  for (Cell* c = first; c != first + n; ++c) {
    const Side* with = nullptr;
    if (kind != Kind::write && c->last_written() < written && !told) {
      report(at, does(kind, bytes) + " of " + describe() + " that nobody wrote");
      told = true;
    }
    if (const Wrong w = wrong(*c, kind, oldest, with); w != Wrong::nothing && !told) {
      report(at, does(kind, bytes) + " of " + describe() + " " + explain(w, *with, with != &c->read));
      told = true;
    }
    add(kind == Kind::write ? c->written : kind == Kind::atomic ? c->atomics : c->read, oldest);
  }
}

[[noreturn]] void outside(uintptr_t a, size_t bytes, Kind kind, Where at) {
  const Range* nearest = nullptr;
  size_t distance = 4096;
  for (const Range& r : ranges) {
    const size_t d = a >= r.start ? a + bytes - (r.start + r.bytes) : r.start - a;
    if (d < distance) nearest = &r, distance = d;
  }
  if (!nearest) fatal(at, does(kind, bytes) + " outside of all memory that the kernel was given");
  const char* side = a >= nearest->start ? "past the end of" : "before the start of";
  fatal(at, does(kind, bytes) + format(", %zu bytes %s %s", distance, side, describe(*nearest).c_str()));
}

void global_access(uintptr_t a, size_t bytes, Kind kind, const void* caller, const Site* site) {
  Range* r = find(a);
  if (!r || a - r->start + bytes > r->bytes) [[unlikely]] {
    const bool argument = a - reinterpret_cast<uintptr_t>(machine.launch->bound) < machine.launch->bound_bytes;
    const bool constant = module_start <= a && a < module_end;
    if (!writes(kind) && (argument || constant)) return;
    outside(a, bytes, kind, place(caller, site));
  }
  if (r->access == Access::in) {
    if (writes(kind)) fatal(place(caller, site), does(kind, bytes) + " of " + describe(*r));
    return;
  }
  const size_t offset = a - r->start;
  Cell* const cells = r->shadow.at(offset, bytes);
  const uint32_t written = r->access == Access::inout ? 0 : kHost;
  check_cells(cells, r->shadow.count(bytes), bytes, kind, written, machine.launch_epoch, place(caller, site),
              [&] { return describe(*r) + format(" at %zu", offset); });
  if (kind == Kind::atomic) note_atomic();
}

void shared_access(uintptr_t offset, size_t bytes, Kind kind, const void* caller, const Site* site) {
  const size_t size = machine.launch->shared;
  if (offset > size || offset + bytes > size) [[unlikely]]
    fatal(place(caller, site), does(kind, bytes) + format(" of shared memory at %td, outside of its %zu bytes",
                                                          static_cast<ptrdiff_t>(offset), size));
  Cell* const cells = shared_shadow.at(offset, bytes);
  check_cells(cells, shared_shadow.count(bytes), bytes, kind, machine.block_epoch, machine.block_epoch,
              place(caller, site), [&] { return format("shared memory at %zu", static_cast<size_t>(offset)); });
}

// Which argument of the kernel points to which memory: itself, or a member of a struct.
void name_arguments() {
  for (Range& r : ranges) r.argument = 0;
  for (size_t i = machine.launch->argument_count; i-- > 0;) {
    const Argument& argument = machine.launch->arguments[i];
    for (size_t at = 0; at + sizeof(uintptr_t) <= argument.bytes; at += sizeof(uintptr_t)) {
      uintptr_t word;
      std::memcpy(&word, static_cast<const char*>(argument.p) + at, sizeof(word));
      if (Range* r = find(word)) r->argument = i + 1;
    }
  }
}

void find_module() {
  const auto kernel = reinterpret_cast<uintptr_t>(machine.launch->kernel);
  if (module_start <= kernel && kernel < module_end) return;
  const auto look = [](dl_phdr_info* module, size_t, void* wanted) {
    uintptr_t start = UINTPTR_MAX, end = 0;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& segment = module->dlpi_phdr[i];
      if (segment.p_type != PT_LOAD) continue;
      start = std::min<uintptr_t>(start, module->dlpi_addr + segment.p_vaddr);
      end = std::max<uintptr_t>(end, module->dlpi_addr + segment.p_vaddr + segment.p_memsz);
    }
    const auto address = reinterpret_cast<uintptr_t>(wanted);
    if (address < start || address >= end) return 0;
    module_start = start, module_end = end;
    return 1;
  };
  dl_iterate_phdr(look, machine.launch->kernel);
}
}  // namespace

void access(const void* p, size_t bytes, Kind kind, const void* caller, const Site* site) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (++running->accesses == kEndless) [[unlikely]]
    fatal(place(caller, site), "does not end: waits for another thread or block in a loop?");
  const uintptr_t shared = a - reinterpret_cast<uintptr_t>(machine.shared);
  if (shared + kBefore < kWindow)
    shared_access(shared, bytes, kind, caller, site);
  else if (a - running->stack >= kStack)
    global_access(a, bytes, kind, caller, site);
}

void begin_launch_memory() {
  begin_launch_ordering();
  name_arguments();
  find_module();
  if (machine.shared) return;
  void* p = nullptr;
  if (posix_memalign(&p, 4096, kWindow)) throw std::bad_alloc();
  machine.shared = static_cast<unsigned char*>(p) + kBefore;
}

void begin_block_memory() {
  begin_block_ordering();
  std::memset(machine.shared, 0xff, machine.launch->shared);  // NaN
}

void permit(const void* p, size_t bytes, Access access) {
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
      throw std::runtime_error(format("memory (%s, %zu bytes) overlaps %s", name(access), bytes, describe(*r).c_str()));
    const uintptr_t end = std::max(start + bytes, r->start + r->bytes);
    start = std::min(start, r->start), bytes = end - start;
    r = ranges.erase(r);
  }
  const auto at = std::find_if(ranges.begin(), ranges.end(), [&](const Range& r) { return r.start > start; });
  ranges.insert(at, {start, bytes, access, 0, Shadow(bytes)});
}

void zero(void* p, size_t bytes) {
  if (!bytes) return;
  const auto a = reinterpret_cast<uintptr_t>(p);
  Range* r = find(a);
  if (!r || r->access == Access::in || a - r->start + bytes > r->bytes)
    throw std::runtime_error("zero(): not memory that a kernel may write");
  std::memset(p, 0, bytes);
  Cell* c = r->shadow.at(a - r->start, bytes);
  for (size_t n = r->shadow.count(bytes); n; --n, ++c) c->written = {kHost};
}

void forget_memory(bool check_outputs) {
  for (Range& r : ranges) {
    if (!check_outputs || r.access != Access::out) continue;
    Cell* c = r.shadow.at(0, r.bytes);
    size_t missing = 0, first = 0;
    for (size_t i = r.shadow.count(r.bytes); i-- > 0;)
      if (!c[i].last_written()) ++missing, first = i;
    const size_t unit = r.shadow.unit();
    if (missing)
      report(Where(), format("%zu bytes of %s were never written, the first at %zu", missing * unit,
                             describe(r).c_str(), first * unit));
  }
  ranges.clear();
}

bool memory_left() { return !ranges.empty(); }

}  // namespace shim
