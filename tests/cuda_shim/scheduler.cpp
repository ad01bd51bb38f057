// Runs kernels: blocks one after another, the threads of a block in turn, each until it waits or returns.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "machine.h"

namespace shim {

Machine machine;
constinit thread_local Thread* running = nullptr;

namespace {
enum class Order { forward, reverse, shuffled };
Order order = Order::forward;
uint64_t seed = 0;

std::recursive_mutex in_use;  // operators called from several threads run one after another
bool in_call = false;

uint64_t random_bits() {  // xorshift64*
  seed ^= seed >> 12, seed ^= seed << 25, seed ^= seed >> 27;
  return seed * 0x2545f4914f6cdd1dull;
}

template <class T>
void arrange(std::vector<T>& items) {
  std::iota(items.begin(), items.end(), T(0));
  if (order == Order::reverse) std::reverse(items.begin(), items.end());
  if (order == Order::shuffled)
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_bits() % i]);
}

unsigned warps() { return (machine.threads + kLanes - 1) / kLanes; }
unsigned lanes(unsigned warp) { return std::min(kLanes, machine.threads - warp * kLanes); }

void thread_main() {
  machine.launch->call(machine.launch->bound);
  running->state = State::returned;
  leave();
}

void reset_warp(Warp& w) {
  w.counter = 1;
  std::fill_n(w.clock, kLanes, 1u);
  for (auto& row : w.seen) std::fill_n(row, kLanes, 1u);
}

void begin_block(uint64_t index) {
  const uint3 g = machine.launch->grid;
  machine.block = {static_cast<unsigned>(index % g.x), static_cast<unsigned>(index / g.x % g.y),
                   static_cast<unsigned>(index / g.x / g.y)};
  machine.block_epoch = ++machine.epoch;
  begin_block_memory();
  const uint3 b = machine.launch->block;
  for (unsigned i = 0; i < machine.threads; ++i) {
    Thread& t = machine.thread[i];
    t.linear = i, t.warp = i / kLanes, t.lane = i % kLanes;
    t.index = {i % b.x, i / b.x % b.y, i / b.x / b.y};
    t.state = State::ready;
    t.accesses = 0;
    start_fiber(t, thread_main);
  }
  for (unsigned w = 0; w < warps(); ++w) reset_warp(machine.warp[w]);
}

// Has every thread of the block come to the same barrier? Then all go on.
bool open_barrier() {
  const Thread* const end = machine.thread + machine.threads;
  const Site site = machine.thread[0].site;
  unsigned predicates = 0;
  for (const Thread* t = machine.thread; t != end; ++t) {
    if (t->state != State::at_barrier || t->site != site) return false;
    predicates += t->value != 0;
  }
  ++machine.epoch;
  for (unsigned i = 0; i < machine.threads; ++i) {
    machine.thread[i].state = State::ready;
    machine.thread[i].result = predicates;
  }
  return true;
}

const char* name(const Thread& t) {
  constexpr const char* names[] = {"__syncwarp",        "a shuffle",         "a ballot",          "__match_any_sync",
                                   "__reduce_add_sync", "__reduce_min_sync", "__reduce_min_sync", "__reduce_max_sync",
                                   "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  return t.state == State::at_barrier ? "__syncthreads" : names[static_cast<int>(t.kind)];
}

std::string doing(const Thread& t) {
  if (t.state == State::returned) return "has returned";
  std::string what = format("waits at %s (%s)", name(t), line_of(t.site).c_str());
  if (t.state == State::at_collective) what += format(" for the lanes %#x", t.mask);
  return what;
}

// The threads of the block by what they do, one line of text for each group.
std::string standing() {
  std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const std::string what = doing(machine.thread[i]);
    auto g = std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == what; });
    if (g == groups.end()) g = groups.insert(g, {what, {}});
    g->second.push_back(i);
  }
  std::string text;
  for (const auto& [what, who] : groups) {
    text += text.empty() ? "" : "; ";
    text += thread_name(machine.thread[who[0]]);
    if (who.size() > 1) text += format(" and %zu more", who.size() - 1);
    text += " " + what;
  }
  return text;
}

// Nobody can go on, and not all have returned: names a thread that waits in vain, and says where everybody is.
void report_stuck() {
  const Thread* first = nullptr;
  for (unsigned i = 0; i < machine.threads && !first; ++i)
    if (machine.thread[i].state != State::returned) first = &machine.thread[i];
  report_as(first, first->site, format("waits at %s that others never reach: ", name(*first)) + standing());
  machine.aborted = true;
}

// Runs the lanes of a warp until each of them waits or has returned.
bool run_warp(unsigned warp, const std::vector<uint8_t>& lane_order) {
  bool moved = false;
  for (bool again = true; again && !machine.aborted;) {
    again = false;
    for (unsigned lane : lane_order) {
      if (lane >= lanes(warp)) continue;
      Thread& t = machine.thread[warp * kLanes + lane];
      if (t.state != State::ready) continue;
      resume(t);
      moved = again = true;
      if (machine.aborted) break;
    }
  }
  return moved;
}

void run_block(uint64_t index) {
  begin_block(index);
  std::vector<uint8_t> warp_order(warps()), lane_order(kLanes);
  while (!machine.aborted) {
    arrange(warp_order);
    bool moved = false;
    for (unsigned w : warp_order) {
      arrange(lane_order);
      moved |= run_warp(w, lane_order);
      if (machine.aborted) return;
    }
    if (moved || open_barrier()) continue;
    const Thread* const end = machine.thread + machine.threads;
    if (std::any_of(machine.thread, const_cast<Thread*>(end),
                    [](const Thread& t) { return t.state != State::returned; }))
      report_stuck();
    return;
  }
}

void check_sizes(const Launch& l) {
  const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  const auto refuse = [&](const char* what, unsigned long long value) {
    throw std::runtime_error(std::string(l.op) + ": a launch with " + what + format(" %llu", value));
  };
  if (threads < 1 || threads > kMaxThreads || l.block.z > 64) refuse("threads in a block:", threads);
  if (l.grid.y > 65535 || l.grid.z > 65535) refuse("blocks in y or z:", std::max(l.grid.y, l.grid.z));
  if (l.grid.x > 0x7fffffff) refuse("blocks in x:", l.grid.x);
  if (l.shared > kMaxShared) refuse("bytes of shared memory:", l.shared);
}
}  // namespace

void run(const Launch& launch) {
  const std::lock_guard lock(in_use);
  if (running) throw std::runtime_error("a kernel launches a kernel");
  check_sizes(launch);
  machine.launch = &launch;
  machine.op = launch.op;
  machine.threads = launch.block.x * launch.block.y * launch.block.z;
  machine.kernel = launch.kernel, machine.kernel_threads = machine.threads, machine.kernel_shared = launch.shared;
  machine.aborted = false;
  machine.launch_epoch = machine.epoch + 1;
  begin_launch_memory();
  std::vector<uint64_t> blocks(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
  arrange(blocks);
  for (uint64_t block : blocks) {
    run_block(block);
    if (machine.aborted) break;
  }
  machine.launch = nullptr;
  if (errors()) throw_errors(launch.op);
}

OperatorCall::OperatorCall(int32_t) : exceptions_(std::uncaught_exceptions()) {
  in_use.lock();
  if (in_call) {
    in_use.unlock();
    throw std::runtime_error("an operator starts while another one runs in the same thread");
  }
  in_call = true;
  machine.op = "operator";
}

OperatorCall::~OperatorCall() noexcept(false) {
  const bool normal = std::uncaught_exceptions() == exceptions_;
  forget_memory(normal);
  in_call = false;
  in_use.unlock();
  if (normal && errors()) throw_errors(machine.op);
}

unsigned block_barrier(bool predicate, Site site) {
  Thread& t = *running;
  t.state = State::at_barrier, t.site = site, t.value = predicate;
  leave();
  return static_cast<unsigned>(t.result);
}

uint3 thread_index() { return running->index; }
uint3 block_index() { return machine.block; }
uint3 block_dim() { return machine.launch->block; }
uint3 grid_dim() { return machine.launch->grid; }
void* shared_memory() { return machine.shared; }
void trap(Site site) { fatal(site, "__trap"); }

}  // namespace shim

extern "C" {
SHIM_EXPORT void shim_schedule(int order, unsigned long long seed) {
  shim::order = static_cast<shim::Order>(order);
  shim::seed = seed * 2 + 1;
}
// What should not be there between two operators: permitted memory, an operator that has not ended, an error untold.
SHIM_EXPORT int shim_left_over() { return shim::memory_left() + 2 * shim::in_call + 4 * shim::errors(); }
}
