// The boundary of kaldi_fbank on a GPU: checks, the output, one launch.
#include "kaldi_fbank/kaldi_fbank_kernel.cuh"
#include "log_mel/mel_launch.cuh"

namespace atst {
namespace {

// Arguments and result as of the CPU operator (kaldi_fbank_cpu.cpp). A length on the device cannot be looked at here:
// where it is impossible, the clip becomes NaN.
Tensor kaldi_fbank(const Tensor& waveform, const Tensor& window, const Tensor& fb, const std::optional<Tensor>& lengths,
                   int64_t shift, double preemphasis, bool remove_dc_offset) {
  const char* op = "kaldi_fbank";
  check_device(waveform, op, "waveform");
  const Call call(op, waveform);
  const bool is_int16 = waveform.scalar_type() == ScalarType::Short;
  ATST_CHECK(is_int16 || waveform.scalar_type() == ScalarType::Float, op, ": waveform must be float32 or int16");
  check_dim(waveform, 2, op, "waveform");
  check_contiguous(waveform, op, "waveform");
  check_mel_table(call, window, 1, "window");
  check_mel_table(call, fb, 2, "fb");
  const int64_t rows = waveform.size(0), samples = waveform.size(1), frame = window.size(0), n_mels = fb.size(1);
  const int64_t n_fft = 2 * (fb.size(0) - 1);
  ATST_CHECK(n_fft == 512 || n_fft == 1024 || n_fft == 2048, op, ": fb must have 257, 513 or 1025 rows");
  ATST_CHECK(n_mels <= 1024, op, ": fb must have at most 1024 columns on a GPU, got ", n_mels);
  ATST_CHECK(frame >= 1 && frame <= n_fft, op, ": window must have from 1 to n_fft values");
  ATST_CHECK(shift >= 1 && shift <= frame, op, ": frame_shift must be from 1 to the window's length");
  ATST_CHECK(samples >= frame, op, ": waveform must have at least one frame of samples");
  check_mel_lengths(call, lengths, rows);
  const int64_t frames = (samples - frame) / shift + 1;
  Tensor out = torch::stable::new_empty(waveform, {rows, frames, n_mels}, ScalarType::Float);
  if (rows == 0 || n_mels == 0) return out;
  const int64_t tile_frames = int64_t(kMelThreads) * 64 / n_fft, tiles = (frames + tile_frames - 1) / tile_frames;
  ATST_CHECK(tiles <= (int64_t(1) << 30) / rows, op, ": waveform is too large: ", rows, " clips of ", frames,
             " frames");
  KaldiFbankArgs a{};
  a.wave = call.in<void>(waveform);
  a.window = call.in<float>(window), a.fb = call.in<float>(fb);
  a.lengths = lengths ? call.in<int64_t>(*lengths) : nullptr;
  a.out = call.out<float>(out);
  a.samples = samples, a.frames = frames;
  a.items = static_cast<int>(rows * tiles), a.tiles = static_cast<int>(tiles);
  a.window_size = static_cast<int>(frame), a.hop = static_cast<int>(shift), a.n_mels = static_cast<int>(n_mels);
  a.is_int16 = is_int16, a.remove_dc_offset = remove_dc_offset;
  a.preemphasis = static_cast<float>(preemphasis), a.inverse_size = 1.0f / static_cast<float>(frame);
  launch_mel(call, n_fft, kaldi_fbank_kernel<8>, kaldi_fbank_kernel<16>, kaldi_fbank_kernel<32>, a);
  return out;
}

}  // namespace
}  // namespace atst

ATST_CUDA_IMPL(m) { m.impl("kaldi_fbank", TORCH_BOX(&atst::kaldi_fbank)); }
