// Spectrogram to tokens on the CPU. The product is torch's own matrix product; what this adds is that only the patches
// of tokens that are not masked are gathered and multiplied, and that bias, mask token and position are one pass over
// the result. Backward: the same gathered patches, one pass over the incoming gradient per sum.
#include <cstring>

#include "check.h"

namespace atst {
namespace {

struct Geometry {
  int64_t clips, bins, frames, ph, pw, sh, sw, rows, columns;

  Geometry(const char* op, const Tensor& mel, const std::vector<int64_t>& patch, const std::vector<int64_t>& stride) {
    check_cpu(mel, op, "mel");
    check_contiguous(mel, op, "mel");
    check_dtype(mel, ScalarType::Float, op, "mel");
    check_dim(mel, 4, op, "mel");
    ATST_CHECK(mel.size(1) == 1, op, ": mel must have one channel");
    ATST_CHECK(patch.size() == 2 && stride.size() == 2, op, ": patch and stride must have two entries");
    clips = mel.size(0), bins = mel.size(2), frames = mel.size(3);
    ph = patch[0], pw = patch[1], sh = stride[0], sw = stride[1];
    ATST_CHECK(ph > 0 && pw > 0 && sh > 0 && sw > 0, op, ": patch and stride must be positive");
    rows = bins < ph ? 0 : (bins - ph) / sh + 1;
    columns = frames < pw ? 0 : (frames - pw) / sw + 1;
  }
  int64_t tokens() const { return rows * columns; }
  int64_t values() const { return ph * pw; }
  // first value of the patch of token `flat` of all clips; tokens run through the rows of a column, then on in time
  int64_t corner(int64_t flat) const {
    const int64_t clip = flat / tokens(), token = flat % tokens();
    return (clip * bins + token % rows * sh) * frames + token / rows * sw;
  }
};

// Flat indices of the tokens that are (not) masked.
std::vector<int64_t> select(const char* op, const Geometry& g, const std::optional<Tensor>& mask, bool masked) {
  const int64_t total = g.clips * g.tokens();
  const bool* m = nullptr;
  if (mask) {
    check_cpu(*mask, op, "mask");
    check_contiguous(*mask, op, "mask");
    check_dtype(*mask, ScalarType::Bool, op, "mask");
    ATST_CHECK(mask->numel() == total, op, ": mask must have an entry per token");
    m = mask->const_data_ptr<bool>();
  }
  std::vector<int64_t> chosen;
  chosen.reserve(total);
  for (int64_t i = 0; i < total; ++i)
    if ((m && m[i]) == masked) chosen.push_back(i);
  return chosen;
}

Tensor gather_patches(const Geometry& g, const Tensor& mel, const std::vector<int64_t>& kept) {
  Tensor out = torch::stable::new_empty(mel, {int64_t(kept.size()), g.values()});
  const float* from = mel.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, int64_t(kept.size()), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t r = 0; r < g.ph; ++r)
        std::memcpy(to + i * g.values() + r * g.pw, from + g.corner(kept[i]) + r * g.frames, g.pw * sizeof(float));
  });
  return out;
}

const float* optional_rows(const std::optional<Tensor>& t, int64_t rows, int64_t width, const char* op,
                           const char* name) {
  if (!t) return nullptr;
  check_cpu(*t, op, name);
  check_contiguous(*t, op, name);
  check_dtype(*t, ScalarType::Float, op, name);
  ATST_CHECK(t->numel() == rows * width, op, ": ", name, " must have ", rows, " x ", width, " values, got ",
             t->numel());
  return t->const_data_ptr<float>();
}

void check_weight(const char* op, const Geometry& g, const Tensor& weight) {
  check_cpu(weight, op, "weight");
  check_contiguous(weight, op, "weight");
  check_dtype(weight, ScalarType::Float, op, "weight");
  check_dim(weight, 2, op, "weight");
  ATST_CHECK(weight.size(1) == g.values(), op, ": weight must have ph * pw columns");
}

Tensor patch_embed(const Tensor& mel, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& mask, const std::optional<Tensor>& mask_embed,
                   const std::optional<Tensor>& pos_embed, std::vector<int64_t> patch, std::vector<int64_t> stride) {
  const char* op = "patch_embed";
  const Geometry g(op, mel, patch, stride);
  check_weight(op, g, weight);
  const int64_t width = weight.size(0), tokens = g.tokens(), total = g.clips * tokens;
  const float* b = optional_rows(bias, 1, width, op, "bias");
  const float* token = optional_rows(mask_embed, 1, width, op, "mask_embed");
  const int64_t positions = pos_embed && pos_embed->dim() > 0 ? pos_embed->size(0) : 0;
  const float* pos = optional_rows(pos_embed, positions, width, op, "pos_embed");
  ATST_CHECK(!mask || token, op, ": mask needs mask_embed");
  ATST_CHECK(!pos_embed || positions >= tokens, op, ": pos_embed has fewer rows than there are tokens");
  const std::vector<int64_t> kept = select(op, g, mask, false);
  const Tensor product = torch::stable::matmul(gather_patches(g, mel, kept), torch::stable::transpose(weight, 0, 1));
  std::vector<int64_t> row_of(total, -1);
  for (size_t i = 0; i < kept.size(); ++i) row_of[kept[i]] = int64_t(i);

  Tensor out = torch::stable::new_empty(mel, {g.clips, tokens, width});
  const float* rows = product.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, total, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool masked = row_of[i] < 0;
      const float* from = masked ? token : rows + row_of[i] * width;
      const float* add = masked ? nullptr : b;
      const float* p = pos ? pos + i % tokens * width : nullptr;
      for (int64_t j = 0; j < width; ++j) {
        const float x = add ? from[j] + add[j] : from[j];
        to[i * width + j] = p ? x + p[j] : x;
      }
    }
  });
  return out;
}

// sum[j] = sum over `chosen` of grad[row, j], in the order of the rows
Tensor sum_rows(const Tensor& grad, const std::vector<int64_t>& chosen, int64_t width) {
  Tensor out = torch::stable::new_zeros(grad, {width});
  const float* g = grad.const_data_ptr<float>();
  float* sum = out.mutable_data_ptr<float>();
  parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row : chosen)
      for (int64_t j = begin; j < end; ++j) sum[j] += g[row * width + j];
  });
  return out;
}

Tensor sum_clips(const Tensor& grad, int64_t clips, int64_t tokens, int64_t width, int64_t rows) {
  Tensor out = torch::stable::new_zeros(grad, {rows, width});
  const float* g = grad.const_data_ptr<float>();
  float* sum = out.mutable_data_ptr<float>();
  parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t clip = 0; clip < clips; ++clip)
      for (int64_t i = begin * width; i < end * width; ++i) sum[i] += g[clip * tokens * width + i];
  });
  return out;
}

// Adds the gradient of each patch to the samples it was cut from; patches may overlap, so each clip has one thread.
Tensor scatter_patches(const Geometry& g, const Tensor& mel, const Tensor& dpatches, const std::vector<int64_t>& kept) {
  Tensor out = torch::stable::new_zeros(mel, {g.clips, 1, g.bins, g.frames});
  const float* from = dpatches.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, g.clips, 1, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < kept.size(); ++i) {
      if (kept[i] < begin * g.tokens() || kept[i] >= end * g.tokens()) continue;
      for (int64_t r = 0; r < g.ph; ++r)
        for (int64_t c = 0; c < g.pw; ++c)
          to[g.corner(kept[i]) + r * g.frames + c] += from[i * g.values() + r * g.pw + c];
    }
  });
  return out;
}

// Gradients of weight, bias, mask_embed, pos_embed (its `pos_rows` rows) and, if asked for, mel (otherwise empty).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_backward(
    const Tensor& grad, const Tensor& mel, const Tensor& weight, const std::optional<Tensor>& mask, int64_t pos_rows,
    bool needs_mel, std::vector<int64_t> patch, std::vector<int64_t> stride) {
  const char* op = "patch_embed_backward";
  const Geometry g(op, mel, patch, stride);
  check_weight(op, g, weight);
  const int64_t width = weight.size(0);
  check_cpu(grad, op, "grad");
  check_contiguous(grad, op, "grad");
  check_dtype(grad, ScalarType::Float, op, "grad");
  ATST_CHECK(grad.numel() == g.clips * g.tokens() * width, op, ": grad has the wrong size");
  ATST_CHECK(pos_rows == 0 || pos_rows >= g.tokens(), op, ": pos_rows is less than the number of tokens");
  const std::vector<int64_t> kept = select(op, g, mask, false), masked = select(op, g, mask, true);

  Tensor kept_grad = torch::stable::new_empty(grad, {int64_t(kept.size()), width});
  const float* from = grad.const_data_ptr<float>();
  float* to = kept_grad.mutable_data_ptr<float>();
  for (size_t i = 0; i < kept.size(); ++i) std::memcpy(to + i * width, from + kept[i] * width, width * sizeof(float));
  Tensor dweight = torch::stable::matmul(torch::stable::transpose(kept_grad, 0, 1), gather_patches(g, mel, kept));
  Tensor dpos = pos_rows ? sum_clips(grad, g.clips, g.tokens(), width, pos_rows) : torch::stable::new_empty(grad, {0});
  Tensor dmel = needs_mel ? scatter_patches(g, mel, torch::stable::matmul(kept_grad, weight), kept)
                          : torch::stable::new_empty(grad, {0});
  return {dweight, sum_rows(grad, kept, width), sum_rows(grad, masked, width), dpos, dmel};
}

}  // namespace
}  // namespace atst

STABLE_TORCH_LIBRARY_IMPL(atst_fast, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&atst::patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&atst::patch_embed_backward));
}
