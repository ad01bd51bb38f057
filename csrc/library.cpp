// Every operator schema, on one screen. Shapes and meaning: the docstrings in atst_fast/ops/<op>.py.
#include "stable_shim.h"

// clang-format off
STABLE_TORCH_LIBRARY(atst_fast, m) {
  // log_mel
  m.def("log_mel(Tensor waveform, Tensor window, Tensor fb, Tensor? lengths, int hop_length, float? top_db, float scale, float bias, int group) -> Tensor");

  // augment

  // patch_embed

  // frame_attention

  // ema
  m.def("ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor momentum) -> ()");
  m.def("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, Tensor(e!)[] teachers, Tensor(f!)[] student_shadows, Tensor(g!)[] teacher_shadows, "
        "Tensor hyper, int[] group_sizes, Tensor momentum, Tensor? grad_scale, bool hf) -> ()");
  m.def("grad_norm(Tensor[] grads) -> Tensor");

}
// clang-format on
