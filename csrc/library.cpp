// Every operator schema, on one screen. Shapes and meaning: the docstrings in atst_fast/ops/<op>.py.
#include "stable_shim.h"

#if !defined(ATST_LIBRARY)  // the tests build the CUDA operators a second time, for the CPU, as atst_fast_shim
#  define ATST_LIBRARY atst_fast
#endif

// clang-format off
STABLE_TORCH_LIBRARY(ATST_LIBRARY, m) {
  // log_mel
  m.def("log_mel(Tensor waveform, Tensor window, Tensor fb, Tensor? lengths, int hop_length, float? top_db, float scale, float bias, SymInt group, bool decibels=True) -> Tensor");

  // kaldi_fbank
  m.def("kaldi_fbank(Tensor waveform, Tensor window, Tensor fb, Tensor? lengths, int frame_shift, float preemphasis, bool remove_dc_offset) -> Tensor");

  // augment
  m.def("augment(Tensor mel, Tensor bank, Tensor bank_lengths, Tensor partner, Tensor start, Tensor alpha, Tensor crop, int[] canvas) -> Tensor");

  // patch_embed
  m.def("patch_embed(Tensor mel, Tensor weight, Tensor? bias, Tensor? mask, Tensor? mask_embed, Tensor? pos_embed, int[] patch, int[] stride) -> Tensor");
  m.def("patch_embed_backward(Tensor grad, Tensor mel, Tensor weight, Tensor? mask, SymInt pos_rows, bool needs_mel, int[] patch, int[] stride) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // rows
  m.def("select_rows(Tensor x, Tensor rows, Tensor inverse) -> Tensor");

  // frame_attention
  m.def("frame_attention(Tensor qkv, Tensor? lengths, int num_heads, float scale, bool attend_padded) -> (Tensor out, Tensor lse)");
  m.def("frame_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor? lengths, int num_heads, float scale, bool attend_padded) -> Tensor");
  m.def("frame_attention_packed(Tensor q, Tensor kv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int num_heads, float scale) -> (Tensor out, Tensor lse)");
  m.def("frame_attention_packed_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int num_heads, float scale) -> (Tensor, Tensor)");

  // add_norm
  m.def("add_norm(Tensor x, Tensor? y, Tensor? bias, Tensor? scale, Tensor? weight, Tensor? norm_bias, float eps) -> (Tensor sum, Tensor normed, Tensor mean, Tensor rstd)");
  m.def("add_norm_backward(Tensor? d_sum, Tensor d_normed, Tensor total, Tensor mean, Tensor rstd, Tensor? scale, Tensor? weight, bool has_norm_bias, bool has_bias) -> (Tensor dx, Tensor dy, Tensor dbias, Tensor dweight, Tensor dnorm_bias)");

  // epilogue
  m.def("bias_gelu(Tensor h, Tensor bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad, Tensor h, Tensor bias) -> (Tensor, Tensor)");
  m.def("add_branch(Tensor x, Tensor y, Tensor bias, float alpha, Tensor? kept, Tensor? scale=None) -> Tensor");
  m.def("add_branch_backward(Tensor grad, float alpha, Tensor? kept, Tensor? scale=None) -> (Tensor, Tensor)");
  m.def("batch_norm_relu(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor mean, Tensor variance)");
  m.def("batch_norm_relu_backward(Tensor grad, Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");

  // mlp: a product with its GELU, the gradient of it with the derivative; the two layers of both
  m.def("linear_gelu(Tensor x, Tensor weight, Tensor bias, bool keep_h) -> (Tensor a, Tensor h)");
  m.def("linear_gelu_backward(Tensor grad, Tensor weight2, Tensor h, Tensor bias) -> (Tensor dh, Tensor dbias)");
  m.def("mlp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, bool keep) -> (Tensor out, Tensor a, Tensor h)");
  m.def("mlp_backward(Tensor grad, Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor a, Tensor h, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)");

  // batch_norm_relu in parts, for rows that are padded or of several processes
  m.def("column_moments(Tensor x, Tensor? count) -> Tensor");
  m.def("batch_norm_relu_apply(Tensor x, Tensor moments, Tensor weight, Tensor bias, Tensor? count, float eps) -> Tensor");
  m.def("batch_norm_relu_sums(Tensor grad, Tensor x, Tensor moments, Tensor weight, Tensor bias, Tensor? count, float eps) -> Tensor");
  m.def("batch_norm_relu_input_grad(Tensor grad, Tensor x, Tensor moments, Tensor sums, Tensor weight, Tensor bias, Tensor? count, float eps) -> Tensor");

  // frame_loss
  m.def("frame_loss(Tensor student, Tensor teacher, Tensor? count, bool symmetric) -> (Tensor loss, Tensor sums)");
  m.def("frame_loss_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? count, bool symmetric) -> Tensor");

  // ema
  m.def("ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor momentum) -> ()");
  m.def("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, Tensor(e!)[] teachers, Tensor(f!)[] student_shadows, Tensor(g!)[] teacher_shadows, "
        "Tensor hyper, int[] group_sizes, Tensor momentum, Tensor? grad_scale, bool hf) -> ()");
  m.def("grad_norm(Tensor[] grads) -> Tensor");

}
// clang-format on
