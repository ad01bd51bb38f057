// What is known about the bytes of a piece of memory: who wrote and who read them last.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "machine.h"

namespace shim {

// The last accesses of one kind that no later one of the kind follows: those of one epoch.
struct Side {
  uint32_t epoch = 0;  // 0: none
  uint32_t stamp = 0;  // the clock of the latest of them
  uint32_t lanes = 0;  // of which lanes of `warp`
  uint8_t warp = 0;
  bool more_warps = false;   // and of other warps of the block
  bool more_blocks = false;  // and of earlier blocks of the launch
};

// Atomics are apart from plain writes: one that may follow a write says nothing about another one that may not.
struct Cell {
  Side written, atomics, read;

  uint32_t last_written() const { return std::max(written.epoch, atomics.epoch); }
};

// One cell for each 4 bytes, or 2 or 1 as soon as such an access is seen.
class Shadow {
 public:
  explicit Shadow(size_t bytes) : bytes_(bytes) {}

  size_t unit() const { return unit_; }
  size_t count(size_t bytes) const { return (bytes + unit_ - 1) / unit_; }

  // The cells of [offset, offset + bytes).
  Cell* at(size_t offset, size_t bytes) {
    if ((offset | bytes) & (unit_ - 1)) [[unlikely]]
      refine((offset | bytes) & 1 ? 1 : 2);
    if (!cells_) [[unlikely]]
      cells_ = allocate(count(bytes_));
    return cells_.get() + offset / unit_;
  }

 private:
  struct Free {
    void operator()(Cell* p) const { std::free(p); }
  };
  using Cells = std::unique_ptr<Cell[], Free>;

  // All zero, without touching the memory: what is never accessed costs nothing.
  static Cells allocate(size_t n) {
    auto* p = static_cast<Cell*>(std::calloc(n ? n : 1, sizeof(Cell)));
    if (!p) throw std::bad_alloc();
    return Cells(p);
  }
  void refine(size_t unit) {
    const size_t before = count(bytes_), parts = unit_ / unit;
    unit_ = unit;
    if (!cells_) return;
    Cells fine = allocate(count(bytes_));
    for (size_t i = 0; i < before; ++i)
      for (size_t j = i * parts; j < (i + 1) * parts && j < count(bytes_); ++j) fine[j] = cells_[i];
    cells_ = std::move(fine);
  }

  size_t bytes_, unit_ = 4;
  Cells cells_;
};

}  // namespace shim
