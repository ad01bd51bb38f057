// The host side that log_mel and kaldi_fbank share on a GPU.
#pragma once

#include <algorithm>
#include <optional>

#include "launch.cuh"
#include "log_mel/mel_tables.cuh"

namespace atst {

inline void check_mel_table(const Call& call, const Tensor& t, int64_t dim, const char* name) {
  call.same_device(t, name);
  check_dtype(t, ScalarType::Float, call.op, name);
  check_contiguous(t, call.op, name);
  check_dim(t, dim, call.op, name);
}

inline void check_mel_lengths(const Call& call, const std::optional<Tensor>& lengths, int64_t rows) {
  if (!lengths) return;
  call.same_device(*lengths, "lengths");
  check_contiguous(*lengths, call.op, "lengths");
  check_dtype(*lengths, ScalarType::Long, call.op, "lengths");
  ATST_CHECK(lengths->dim() == 1 && lengths->size(0) == rows, call.op, ": lengths must have one entry per row");
}

// A block walks over tiles, two blocks to a multiprocessor; a.weights is chosen here.
template <int G, class Args>
void launch_mel(const Call& call, void (*kernel)(Args), Args a) {
  // runs that do not fit are read from the filterbank itself
  const size_t limit = call.shared_limit, least = MelShared<G>::bytes(a.hop, a.n_mels, 0);
  ATST_CHECK(least <= limit, call.op, ": n_fft, the hop and n_mels together need ", least,
             " bytes of shared memory, and this GPU has ", limit);
  a.weights = std::min(mel_weights(MelShape<G>::n_fft, a.n_mels), static_cast<int>((limit - least) / 16 * 4));
  const int blocks = std::min(a.items, 2 * call.multiprocessors);
  call.launch(kernel, dim3(blocks), dim3(kMelThreads), MelShared<G>::bytes(a.hop, a.n_mels, a.weights), a);
}

// Of the kernels for n_fft 512, 1024 and 2048 the one that fits.
template <class Args>
void launch_mel(const Call& call, int64_t n_fft, void (*kernel512)(Args), void (*kernel1024)(Args),
                void (*kernel2048)(Args), const Args& a) {
  if (n_fft == 512)
    launch_mel<8>(call, kernel512, a);
  else if (n_fft == 1024)
    launch_mel<16>(call, kernel1024, a);
  else
    launch_mel<32>(call, kernel2048, a);
}

}  // namespace atst
