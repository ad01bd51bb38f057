// What the parts of the runtime share: the threads that run, the memory that they may touch, and what went wrong.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_shim.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace shim {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;  // of one block, on an H100
constexpr size_t kStack = 128 * 1024;      // of one fiber

// A place in the source: a Site, or an address of code that is looked up when the message is written.
struct Where {
  const char* file = nullptr;
  int line = 0;
  const void* code = nullptr;
  Where() = default;
  Where(const Site& site) : file(site.file), line(site.line) {}
  Where(const void* code) : code(code) {}
  bool operator==(const Where&) const = default;
};

enum class State : uint8_t { ready, at_barrier, at_collective, returned };

struct Thread {
  void* stack_pointer = nullptr;
  uintptr_t stack = 0;
  uint3 index{};
  unsigned linear = 0, warp = 0, lane = 0;
  State state = State::returned;
  Collective kind{};
  Site site{nullptr, 0};  // where it waits
  unsigned mask = 0, source = 0;
  uint64_t value = 0, result = 0;
  uint64_t accesses = 0;
};

// Which accesses of the other lanes of its warp a lane knows to be over: those that lane u made before its clock was
// seen[lane][u]. Warp collectives pass this knowledge on; a barrier of the block starts a new epoch instead.
struct Warp {
  uint32_t clock[kLanes];
  uint32_t seen[kLanes][kLanes];
  uint32_t counter;
};

struct Machine {
  const Launch* launch = nullptr;
  const char* op = "";  // of the latest launch, as are these three
  const void* kernel = nullptr;
  unsigned kernel_threads = 0;
  size_t kernel_shared = 0;
  uint3 block{};
  unsigned threads = 0;
  Thread thread[kMaxThreads];
  Warp warp[kMaxThreads / kLanes];
  unsigned char* shared = nullptr;
  // Epochs only grow: each block and each of its barriers starts one. 1 is the host.
  uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;
  bool aborted = false;
};
extern Machine machine;
extern constinit thread_local Thread* running __attribute__((tls_model("initial-exec")));

// --- report.cpp
// Notes an error of the running thread (or of none). fatal: the launch ends at once; does not return to the kernel.
void report(const Where& where, std::string what);
[[noreturn]] void fatal(const Where& where, std::string what);
void report_as(const Thread* thread, const Where& where, std::string what);
bool errors();
[[noreturn]] void throw_errors(const char* op);
std::string thread_name(const Thread& thread);
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string line_of(const Where& where);

// --- fiber.cpp
void start_fiber(Thread& thread, void (*entry)());
void resume(Thread& thread);
void leave();  // back to the scheduler

// --- memory.cpp
enum class Kind : uint8_t { read, write, coherent_read, constant_read, atomic };
// caller: where the access is made, or null: at the site
void access(const void* p, size_t bytes, Kind kind, const void* caller, const Site* site = nullptr);
void begin_launch_memory();
void begin_block_memory();
void forget_memory(bool check_outputs);
bool memory_left();

}  // namespace shim
