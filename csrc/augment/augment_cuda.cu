#include <tuple>
#include <vector>

#include "augment/augment_kernel.cuh"
#include "launch.cuh"

namespace atst {
namespace {

constexpr int64_t kMostCanvas = 1 << 20;      // bins or frames, as on the CPU: int and float32 hold any position
constexpr int64_t kSharedBytes = 44 << 10;    // of a block: five of them on a multiprocessor of 228 KiB, three on 164
constexpr int64_t kMostOfSmallBlock = 5120;   // values in shared memory; of more, 128 threads would leave warps idle
constexpr int64_t kMostBankFrames = 1 << 27;  // so that eight rows are an int apart
constexpr int64_t kMostBlocks = 0x7fffffff;

// Most samples of an axis that `count` neighbouring outputs read: their distance, four taps, one because the first
// output lies between two samples, one because positions are rounded.
int64_t most_read(int64_t count, int64_t in, int64_t out) {
  const int64_t span = count > 1 ? (count - 1) * (in - 1) / (out - 1) + 6 : 4;
  return span < in ? span : in;
}

int64_t tiles(int64_t all, int64_t size) { return (all - 1) / size + 1; }

struct Launch {
  int64_t tiles;  // of a clip
  int64_t shared;
  int threads;
};

// The largest tile that fits into shared memory, halved along the axis of which it reads the most.
Launch choose_tile(AugmentArgs& a) {
  AugmentTile& t = a.tile;
  t.bins = a.bins;
  t.frames = a.frames < kAugmentFrames ? a.frames : kAugmentFrames;
  for (;;) {
    const int64_t rows = most_read(t.bins, a.canvas_bins, a.bins);
    const int64_t columns = most_read(t.frames, a.canvas_frames, a.frames);
    const int64_t shared = sizeof(AugmentPlan) + t.bins * sizeof(Taps) + rows * columns * sizeof(float);
    if (shared <= kSharedBytes) {
      t.stride = static_cast<int>(columns);
      t.bin_tiles = static_cast<int>(tiles(a.bins, t.bins));
      t.frame_tiles = static_cast<int>(tiles(a.frames, t.frames));
      return {tiles(a.bins, t.bins) * tiles(a.frames, t.frames), shared,
              rows * columns > kMostOfSmallBlock ? 256 : 128};
    }
    int& axis = t.frames == 1 || (t.bins > 1 && rows > columns) ? t.bins : t.frames;
    axis = (axis + 1) / 2;
  }
}

template <class T>
const T* per_clip(const Call& call, const Tensor& t, ScalarType dtype, int64_t count, const char* name) {
  call.same_device(t, name);
  check_contiguous(t, call.op, name);
  check_dtype(t, dtype, call.op, name);
  ATST_CHECK(t.numel() == count, call.op, ": ", name, " has the wrong number of values");
  return call.in<T>(t);
}

// As for the CPU (augment_cpu.cpp), but the values of the draws stay on the device: a clip whose draws are out of range
// gets a view of NaN.
Tensor augment(const Tensor& mel, const Tensor& bank, const Tensor& bank_lengths, const Tensor& partner,
               const Tensor& start, const Tensor& alpha, const Tensor& crop, std::vector<int64_t> canvas) {
  const char* op = "augment";
  check_device(mel, op, "mel");
  const Call call(op, mel);
  for (auto [t, dim, name] : {std::tuple{&mel, int64_t(4), "mel"}, {&bank, int64_t(3), "bank"}}) {
    call.same_device(*t, name);
    check_contiguous(*t, op, name);
    check_dtype(*t, ScalarType::Float, op, name);
    check_dim(*t, dim, op, name);
  }
  const int64_t clips = mel.size(0), slots = bank.size(0), bins = mel.size(2), frames = mel.size(3);
  ATST_CHECK(canvas.size() == 2, op, ": canvas must have two entries");
  ATST_CHECK(mel.size(1) == 1, op, ": mel must have one channel");
  ATST_CHECK(canvas[0] >= bins && canvas[1] >= frames, op, ": canvas must be at least as large as mel");
  ATST_CHECK(canvas[0] <= kMostCanvas && canvas[1] <= kMostCanvas, op, ": canvas must be at most ", kMostCanvas,
             " either way");
  ATST_CHECK(slots == 0 || bank.size(1) == bins, op, ": bank must have the mel bins of mel");
  ATST_CHECK(bank.size(2) <= kMostBankFrames, op, ": bank must have at most ", kMostBankFrames, " frames, got ",
             bank.size(2));

  Tensor view = torch::stable::new_empty(mel, {clips, 1, bins, frames});
  AugmentArgs a{};
  a.bank_lengths = per_clip<int64_t>(call, bank_lengths, ScalarType::Long, slots, "bank_lengths");
  a.partner = per_clip<int64_t>(call, partner, ScalarType::Long, clips, "partner");
  a.start = per_clip<int64_t>(call, start, ScalarType::Long, clips, "start");
  a.alpha = per_clip<float>(call, alpha, ScalarType::Float, clips, "alpha");
  a.crop = per_clip<int64_t>(call, crop, ScalarType::Long, 4 * clips, "crop");
  if (view.numel() == 0) return view;
  a.mel = call.in<float>(mel);
  a.bank = call.in<float>(bank);
  a.view = call.out<float>(view);
  a.clips = clips, a.slots = slots, a.bank_frames = bank.size(2);
  a.bins = static_cast<int>(bins), a.frames = static_cast<int>(frames);
  a.canvas_bins = static_cast<int>(canvas[0]), a.canvas_frames = static_cast<int>(canvas[1]);
  const Launch launch = choose_tile(a);
  const int64_t blocks = clips * launch.tiles;
  ATST_CHECK(blocks <= kMostBlocks, op, ": mel and canvas must not need more than ", kMostBlocks, " blocks, got ",
             blocks);
  call.launch(augment_kernel, dim3(static_cast<unsigned>(blocks)), dim3(launch.threads), launch.shared, a);
  return view;
}

}  // namespace
}  // namespace atst

ATST_CUDA_IMPL(m) { m.impl("augment", TORCH_BOX(&atst::augment)); }
