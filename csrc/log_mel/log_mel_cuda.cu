// The boundary of log_mel on a GPU: checks, the output and its scratch, one launch.
#include "log_mel/log_mel_kernel.cuh"
#include "log_mel/mel_launch.cuh"

namespace atst {
namespace {

// Arguments and result as of the CPU operator (log_mel_cpu.cpp). A length on the device cannot be looked at here: where
// it is impossible, the clip becomes NaN.
Tensor log_mel(const Tensor& waveform, const Tensor& window, const Tensor& fb, const std::optional<Tensor>& lengths,
               int64_t hop, std::optional<double> top_db, double scale, double bias, int64_t group, bool decibels) {
  const char* op = "log_mel";
  check_device(waveform, op, "waveform");
  const Call call(op, waveform);
  const bool is_int16 = waveform.scalar_type() == ScalarType::Short;
  ATST_CHECK(is_int16 || waveform.scalar_type() == ScalarType::Float, op, ": waveform must be float32 or int16");
  check_dim(waveform, 2, op, "waveform");
  check_contiguous(waveform, op, "waveform");
  check_mel_table(call, window, 1, "window");
  check_mel_table(call, fb, 2, "fb");
  const int64_t rows = waveform.size(0), samples = waveform.size(1), n_fft = window.size(0), n_mels = fb.size(1);
  ATST_CHECK(n_fft == 512 || n_fft == 1024 || n_fft == 2048, op, ": window must have 512, 1024 or 2048 values");
  ATST_CHECK(fb.size(0) == n_fft / 2 + 1, op, ": fb must have n_fft / 2 + 1 rows");
  ATST_CHECK(n_mels <= 1024, op, ": fb must have at most 1024 columns on a GPU, got ", n_mels);
  ATST_CHECK(hop > 0 && hop <= n_fft, op, ": hop_length must be from 1 to n_fft");
  ATST_CHECK(scale > 0, op, ": scale must be positive");
  ATST_CHECK(group > 0 && rows % group == 0, op, ": group must divide the number of rows");
  ATST_CHECK(rows == 0 || samples > n_fft / 2, op, ": waveform must have more than n_fft / 2 samples");
  check_mel_lengths(call, lengths, rows);
  ATST_CHECK(!lengths || group == 1, op, ": group must be 1 with lengths");
  const int64_t frames = samples / hop + 1;
  Tensor out = torch::stable::new_empty(waveform, {rows, n_mels, frames}, ScalarType::Float);
  if (rows == 0 || n_mels == 0) return out;
  const int64_t groups = rows / group, tile_frames = int64_t(kMelThreads) * 64 / n_fft;
  const int64_t tiles = (frames + tile_frames - 1) / tile_frames;
  ATST_CHECK(tiles <= (int64_t(1) << 30) / rows, op, ": waveform is too large: ", rows, " clips of ", frames,
             " frames");
  Tensor counters = torch::stable::new_empty(waveform, {2 * groups}, ScalarType::Int);
  Tensor tile_min = torch::stable::new_empty(waveform, {rows * tiles}, ScalarType::Float);
  LogMelArgs a{};
  a.wave = call.in<void>(waveform);
  a.window = call.in<float>(window), a.fb = call.in<float>(fb);
  a.lengths = lengths ? call.in<int64_t>(*lengths) : nullptr;
  a.out = call.out<float>(out);
  if (top_db) {
    a.peak = call.scratch<uint32_t>(counters), a.ticket = a.peak + groups;
    a.tile_min = call.scratch<float>(tile_min);
    call.zero(a.peak, 2 * groups * sizeof(uint32_t));
  }
  a.samples = samples, a.frames = frames;
  a.items = static_cast<int>(rows * tiles), a.tiles = static_cast<int>(tiles);
  a.window_size = static_cast<int>(n_fft), a.hop = static_cast<int>(hop), a.n_mels = static_cast<int>(n_mels),
  a.group = static_cast<int>(group);
  a.is_int16 = is_int16, a.decibels = decibels;
  a.top_db = top_db ? static_cast<float>(*top_db) : 0.0f;
  a.scale = static_cast<float>(scale), a.bias = static_cast<float>(bias);
  launch_mel(call, n_fft, log_mel_kernel<8>, log_mel_kernel<16>, log_mel_kernel<32>, a);
  return out;
}

}  // namespace
}  // namespace atst

ATST_CUDA_IMPL(m) { m.impl("log_mel", TORCH_BOX(&atst::log_mel)); }
