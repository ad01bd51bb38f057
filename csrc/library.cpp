// Every operator schema, on one screen. Shapes and meaning: the docstrings in atst_fast/ops/<op>.py.
#include "stable_shim.h"

// clang-format off
STABLE_TORCH_LIBRARY(atst_fast, m) {
  // log_mel

  // augment

  // patch_embed

  // frame_attention

  // ema

}
// clang-format on
