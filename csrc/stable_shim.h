// All that the project uses of libtorch, through its stable ABI (TORCH_TARGET_VERSION 2.10, set by setup.py): one build
// serves every torch from 2.10 on. Only library.cpp and the files <op>_cpu.cpp include this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace atst {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;  // over at::parallel_for: follows torch.set_num_threads; the body must not throw
using torch::stable::Tensor;

}  // namespace atst
