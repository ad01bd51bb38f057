// Errors: collected while a kernel runs, one per place and kind, and put in words when it ends.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <stdexcept>

#include "machine.h"

namespace shim {

namespace {
constexpr size_t kMaxErrors = 20;

struct Error {
  Where where;
  std::string what, who;
  const void* kernel;
  int repeats = 0;
};
std::vector<Error> collected;
int left_out = 0;

// The words of a message without its numbers: two errors of one line that differ in numbers only are one error.
std::string words(const std::string& what) {
  std::string kept;
  for (char c : what)
    if (c < '0' || c > '9') kept += c;
  return kept;
}

// What addr2line says about an address of a loaded module: the function and the line of the innermost inlined frame.
struct Code {
  std::string function, line;
};
Code look_up(const void* code) {
  static std::map<const void*, Code> known;
  if (const auto k = known.find(code); k != known.end()) return k->second;
  Dl_info info;
  if (!code || !dladdr(code, &info) || !info.dli_fname) return {};
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase);
  FILE* pipe = popen(format("addr2line -fCe '%s' %#tx 2>/dev/null", info.dli_fname, offset).c_str(), "r");
  if (!pipe) return {};
  std::string lines[2];
  char buffer[4096];
  for (auto& line : lines)
    if (fgets(buffer, sizeof(buffer), pipe)) line = buffer;
  pclose(pipe);
  for (auto& line : lines) line = line.substr(0, line.find_first_of("\n"));
  return known[code] = {lines[0], lines[1].substr(0, lines[1].find(" ("))};
}

// kernel<float> of void atst::(anonymous namespace)::kernel<float>(float*)
std::string short_name(std::string name) {
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at; (at = name.find(unnamed)) != name.npos;) name.erase(at, unnamed.size());
  name = name.substr(0, name.find('('));
  return name.substr(name.substr(0, name.find('<')).find_last_of(" :") + 1);
}
}  // namespace

std::string format(const char* text, ...) {
  char buffer[2048];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

std::string line_of(const Where& where) {
  std::string line;
  if (where.file)
    line = format("%s:%d", where.file, where.line);
  else if (where.code)  // the instruction after the call may belong to the next line
    line = look_up(static_cast<const char*>(where.code) - 1).line;
  return line.substr(line.find_last_of('/') + 1);
}

std::string thread_name(const Thread& thread) {
  return format("thread (%u,%u,%u)", thread.index.x, thread.index.y, thread.index.z);
}

void report_as(const Thread* thread, const Where& where, std::string what) {
  const std::string kind = words(what);
  for (Error& e : collected) {
    if (e.where == where && words(e.what) == kind) {
      ++e.repeats;
      return;
    }
  }
  if (collected.size() == kMaxErrors) {
    ++left_out;
    return;
  }
  std::string who;
  if (machine.launch) {
    const uint3 b = machine.block;
    who = format("block (%u,%u,%u)", b.x, b.y, b.z);
    if (thread) who += " " + thread_name(*thread);
  }
  collected.push_back({where, std::move(what), who, machine.launch ? machine.launch->kernel : nullptr});
}

void report(const Where& where, std::string what) { report_as(running, where, std::move(what)); }

void fatal(const Where& where, std::string what) {
  report(where, std::move(what));
  machine.aborted = true;
  leave();
  __builtin_unreachable();
}

bool errors() { return !collected.empty(); }

void throw_errors(const char* op) {
  std::string message;
  for (const Error& e : collected) {
    if (!message.empty()) message += "\n";
    message += std::string(op) + ": ";
    if (const std::string kernel = short_name(look_up(e.kernel).function); !kernel.empty()) message += kernel + ": ";
    if (!e.who.empty()) message += e.who + ": ";
    message += e.what;
    if (const std::string line = line_of(e.where); !line.empty()) message += " (" + line + ")";
    if (e.repeats) message += format(" and %d more like it", e.repeats);
  }
  if (left_out) message += format("\nand %d more errors", left_out);
  collected.clear();
  left_out = 0;
  throw std::runtime_error(message);
}

}  // namespace shim

// "kernel<arguments> threads bytes" of the latest launch: what it asked for.
extern "C" SHIM_EXPORT const char* shim_latest_launch() {
  using namespace shim;
  static std::string said;
  said =
      short_name(look_up(machine.kernel).function) + format(" %u %zu", machine.kernel_threads, machine.kernel_shared);
  return said.c_str();
}
