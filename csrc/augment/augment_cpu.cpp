#include "augment/augment.h"
#include "check.h"
#include "scratch.h"

namespace atst {
namespace {

constexpr int64_t kMostCanvas = 1 << 20;  // bins or frames: scratch memory grows with it

template <class T>
const T* per_clip(const Tensor& t, ScalarType dtype, int64_t count, const char* name) {
  check_cpu(t, "augment", name);
  check_contiguous(t, "augment", name);
  check_dtype(t, dtype, "augment", name);
  ATST_CHECK(t.numel() == count, "augment: ", name, " has the wrong number of values");
  return static_cast<const T*>(t.const_data_ptr());
}

// mel [B, 1, F, T], bank [C, F, Tb] with bank_lengths [C]; partner, start, alpha [B], crop [B, 4] -> view [B, 1, F, T].
// partner: -1 none, 0 to C - 1 a row of the bank, C + b clip b of mel.
Tensor augment(const Tensor& mel, const Tensor& bank, const Tensor& bank_lengths, const Tensor& partner,
               const Tensor& start, const Tensor& alpha, const Tensor& crop, std::vector<int64_t> canvas) {
  const char* op = "augment";
  for (auto [t, dim, name] : {std::tuple{&mel, int64_t(4), "mel"}, {&bank, int64_t(3), "bank"}}) {
    check_cpu(*t, op, name);
    check_contiguous(*t, op, name);
    check_dtype(*t, ScalarType::Float, op, name);
    check_dim(*t, dim, op, name);
  }
  const int64_t clips = mel.size(0), slots = bank.size(0);
  ATST_CHECK(canvas.size() == 2, op, ": canvas must have two entries");
  const AugmentShape s{mel.size(2), mel.size(3), canvas[0], canvas[1]};
  ATST_CHECK(mel.size(1) == 1, op, ": mel must have one channel");
  ATST_CHECK(s.canvas_bins >= s.bins && s.canvas_frames >= s.frames, op, ": canvas must be at least as large as mel");
  ATST_CHECK(s.canvas_bins <= kMostCanvas && s.canvas_frames <= kMostCanvas, op, ": canvas must be at most ",
             kMostCanvas, " either way");
  ATST_CHECK(slots == 0 || bank.size(1) == s.bins, op, ": bank must have the mel bins of mel");
  const int64_t* widths = per_clip<int64_t>(bank_lengths, ScalarType::Long, slots, "bank_lengths");
  const int64_t* who = per_clip<int64_t>(partner, ScalarType::Long, clips, "partner");
  const int64_t* from = per_clip<int64_t>(start, ScalarType::Long, clips, "start");
  const float* weight = per_clip<float>(alpha, ScalarType::Float, clips, "alpha");
  const int64_t* box = per_clip<int64_t>(crop, ScalarType::Long, 4 * clips, "crop");

  Tensor view = torch::stable::new_empty(mel, {clips, 1, s.bins, s.frames});
  const float* x = mel.const_data_ptr<float>();
  const float* z = bank.const_data_ptr<float>();
  const int64_t size = s.bins * s.frames, bank_stride = bank.size(2);
  if (clips == 0 || size == 0) return view;
  std::vector<AugmentClip> work;
  for (int64_t b = 0; b < clips; ++b) {
    const int64_t* c = box + 4 * b;
    ATST_CHECK(c[0] >= 0 && c[1] >= 0 && c[2] > 0 && c[3] > 0 && c[0] <= s.canvas_bins - c[2] &&
                   c[1] <= s.canvas_frames - c[3],
               op, ": crop ", b, " does not lie within the canvas");
    ATST_CHECK(who[b] >= -1 && who[b] < slots + clips, op, ": partner ", b, " is neither in the bank nor in the batch");
    const bool banked = who[b] >= 0 && who[b] < slots;
    const int64_t width = banked ? widths[who[b]] : s.frames;
    ATST_CHECK(!banked || (width > 0 && width <= bank_stride), op, ": bank_lengths out of range");
    const int64_t slack = width > s.frames ? width - s.frames : s.frames - width;
    ATST_CHECK(who[b] < 0 || (from[b] >= 0 && from[b] <= slack), op, ": start ", b, " must be from 0 to ", slack);
    const float* other = who[b] < 0 ? nullptr
                         : banked   ? z + who[b] * s.bins * bank_stride
                                    : x + (who[b] - slots) * size;
    work.push_back({x + b * size, other, banked ? bank_stride : s.frames, width, from[b], weight[b], c[0], c[1], c[2],
                    c[3], view.mutable_data_ptr<float>() + b * size});
  }
  const auto kernel = ATST_SELECT_SIMD(augment_piece);
  const int64_t floats = ATST_SELECT_SIMD(augment_scratch_floats)(s);
  const int64_t pieces = (s.frames + kAugmentColumns - 1) / kAugmentColumns;
  parallel_for(0, clips * pieces, 4, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate_scratch(floats);
    for (int64_t i = begin; i < end; ++i) kernel(s, work[i / pieces], i % pieces, scratch.get());
  });
  return view;
}

}  // namespace
}  // namespace atst

STABLE_TORCH_LIBRARY_IMPL(atst_fast, CPU, m) { m.impl("augment", TORCH_BOX(&atst::augment)); }
