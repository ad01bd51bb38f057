"""Every tolerance of the tests, with its reason. float32 against golden tensors: rounding of a sum of that length."""

# log_mel
# Between two float32 transforms: 1e-7 of a frame's largest amplitude, seen in a triangle 60 dB below it. Added to ten
# times the rounding noise of the stored value, which is larger where a triangle holds nothing but noise.
MEL_GOLDEN_DB = 2e-3
# Against float64, by distance from the loudest value: 2^-24 * sqrt(log2 n_fft) of the largest amplitude is 1e-4 of an
# amplitude 60 dB down and 1e-3 of one 80 dB down; times 20 / ln 10.
MEL_60_DB = 0.002
MEL_80_DB = 0.02
MEL_60, MEL_80 = 3e-5, 3e-4  # the same on the normalised scale, which is 130 dB over 2
MEL_ENERGY_RTOL = 5e-4  # MEL_60_DB as a ratio of energies
MEL_LIBROSA_DB = 0.02  # librosa's float64 window and triangles differ from float32 ones in the last place
# One transform by two float32 ways (the kernel and torch.stft), on loud and normalised values.
MEL_OTHER_WAY = 1e-3
MEL_SCALED_DB = 1e-4  # the same powers times 100: one rounding each, and that of values up to 100 dB
MEL_CONSTANT = 1e-6  # a constant through the affine map: one rounding of a value of about 1

# kaldi_fbank, in nats of energy: the error of an amplitude 60 dB down (1e-4 of it, see MEL_60_DB), twice.
FBANK_60_DB = 2e-4
# Between two float32 transforms; added to ten times the rounding noise of the stored value.
FBANK_GOLDEN = 2e-4
# One frame by two float32 ways, loud and quiet triangles.
FBANK_OTHER_WAY = 1e-3
FBANK_CONSTANT = 2e-6  # one rounding of a value of about 16

# augment
# Two exponentials and a logarithm of 2 ulp each near 1, then sums of up to 16 products with weights below 1.2.
AUGMENT = 2e-6
# Upstream computes where a column is read in float32: 2^-24 of up to 450 columns, times a slope of a few per column.
AUGMENT_FLOAT64 = 2e-4
# Where the epsilon decides values are about -16: 3 ulp of the GPU's fast logarithm, 1 of the other one.
AUGMENT_QUIET = 4e-6

# patch_embed
# Sums of 256 float32 products, relative to the largest value. (Gradients: ROW_SUM.)
PATCH_EMBED = 1e-5

# frame_attention
# float32 sums of 250 products, twice, in another order than the reference's, relative to the largest value.
ATTENTION_GOLDEN = 5e-6
# Against float64, unit variance: 64 products of a score, the exponential (2 ulp) and an average of values of about 4.
ATTENTION_FORWARD = 2e-6
# Five products deep, relative to the largest gradient.
ATTENTION_GRADIENT = 1e-5
# Scores near 5,000 carry an error of 2^-12, and so do the weights.
ATTENTION_LARGE = 1e-3
# Natural logarithm of the sum of up to 300 exponentials: about 6, a few roundings of scores of up to 5.
ATTENTION_LOG_SUM = 2e-6

# epilogue
# GELU: the polynomial, the exponential and its argument are a few roundings; torch's own float32 GELU has 4e-7. Its
# derivative ends in a sum of two terms of up to z times that size.
BIAS_GELU = 4e-7
BIAS_GELU_DERIVATIVE = 2e-6
GELU_HALF_TAIL = 2**-8  # one rounding to 8 bits, and a polynomial and an exponential of 2^-14 before it
ADD_BRANCH = 3e-7  # three roundings
# Two layers with a GELU between them: float32 sums of some hundred products of either sign, one inside the other,
# relative to the largest value; gradients are up to four deep.
MLP = 1e-5
# Batch norm: a few roundings of the distance from the mean in units of the deviation, and that of the mean, which
# weighs as much as the mean is deviations away from 0. Gradients: the sums of up to 32 rows are float32 as well.
BATCH_NORM = 4e-7
BATCH_NORM_GRAD = 1e-6
# Nearer to 0 than this, of 1 + |weight| + |bias|, rounding decides which side of the ReLU a value is on.
BATCH_NORM_SIDE = 1e-5
# bfloat16 and float16, computed in float32 and rounded at the end as torch does: twice its error, and where torch sums
# parameters' gradients in another order, rounding of such a sum.
HALF_OF_TORCH, HALF_SUM = 2, 1e-6
# The mean of 300 float32 values: a rounding in each update of a running mean. Their distances from it are exact, at
# 1000 deviations from zero to within a unit of 6e-5 deviations, which is what the values themselves lost.
MOMENT_RTOL, VARIANCE_RTOL = 3e-7, 1e-5
# A moment moves a running statistic by one float32 lerp; the second number is for statistics near 0.
RUNNING_RTOL, RUNNING_ATOL = 1e-5, 1e-6
# Sums over rows in float32, of up to 500 terms of both signs, relative to the sum of their sizes.
ROW_SUM = 1e-6

# frame_loss
# Cosines are sums of some hundred products of values of rows of length 1, divided by two such lengths; the gradient of
# a row is the difference of two rows of length 1 times 2 / (rows * length). Sums of columns have it of each row, of
# either sign.
FRAME_LOSS = 2e-6

# add_norm
# float32, relative to the largest value: a dozen roundings and two sums over a row; of rows further than that from 0,
# their distance in deviations counts too.
ADD_NORM = 2e-6

# ema
# teacher + (1 - momentum) * (student - teacher): the difference, the product and the sum are rounded, half a unit each.
EMA_ULPS = 1.5
# AdamW: at most 8 roundings of half a unit on the way to the update, and 3 of the parameter.
ADAMW_ULPS = 4
GRAD_NORM_RTOL = 1e-12  # a sum of float64 squares
# One step: a handful of float32 roundings of the parameter and of the update, which is at most about lr = 1e-3.
ADAMW_RTOL = ADAMW_ULPS * 2**-23
ADAMW_ATOL = 1e-3 * ADAMW_ULPS * 2**-23
# The CUDA kernels fuse what a CPU without fused multiply-add rounds twice: a few half units in the last place of terms
# of size 1, over five steps.
NO_FMA_RTOL, NO_FMA_ATOL = 2e-5, 2e-5

# models
# Golden tensors come with the rounding error of the reference (its distance from float64). Another order of sums has
# an error of that kind too; of the largest of a few thousand values one cannot ask for more than ten times it, and an
# error that happens to be tiny there is at least an ulp or two of the tensor's largest value.
GOLDEN_NOISE = 10
GOLDEN_ULPS = 4 * 2**-23
# Whole networks, ours against the plain structure in the same float32: sums of up to 4096 terms in another order,
# carried through a few blocks and batch statistics; relative to the largest value of each tensor.
NETWORK_RTOL = 5e-5
# The same network on a GPU: other kernels for everything, and gradients that the batch statistics nearly cancel. Not
# measured there yet; a wrong mask or index is off by orders more.
GPU_NETWORK_RTOL = 1e-3
# Sums of up to 12,288 final weights: what two orders of summation in the reference itself leave after five steps.
GOLDEN_CHECKSUM = 1e-3
# One small network on rows of the same content in another batch, selection or graph, or a block and its golden tensors:
# matrix products of other shapes add in another order; activations are about 1.
OTHER_ORDER = 1e-5
# A small network in bfloat16, of the largest value: 8 bits, through some ten roundings.
BF16_RTOL = 5e-2

# train
SCHEDULE_RTOL = 1e-12  # float64; cosines of different libraries differ in the last places
INT16_ROUNDING = 0.51  # half a step of int16, and float32 rounding of values up to 32768 (2^-8 of a step)
GOLDEN_LOSS_RTOL = 1e-5  # float32 means of a few hundred rows, five steps on; the reference repeats itself to 1e-6
GOLDEN_STEP_ATOL = 5e-7  # weights up to 1 after five steps; the reference itself is 2.1e-7 away from float64
# A clip alone or padded in a batch: float32 matrix products of other shapes add in another order, and two blocks of
# residual sums and layer norms of size 1 pass it on.
CHUNKED_FEATURES = 2e-5
# Mel to its own tolerance (in quiet triangles), then mixed and resampled with weights of up to 1.2 in sum 1.4.
FRONT_END = 5e-5
# Six steps of fine-tuning in two processes against one, relative to the largest value of each tensor: statistics over
# the same rows in other sums, and files padded to other lengths, each divided by deviations of some hundredths.
PROCESSES_RTOL = 5e-4

# simd.h: exponential and logarithm, in units in the last place of the result
SIMD_ULP = 2.0

# bf16 training
# Weights and activations carry 8 bits: a step's loss and output deviations are off by some of 2^-8 (0.4 %), and by what
# the weights have drifted apart since. Seen on the loss of single batches of 8 clips: up to 6 %; on means of 20 steps,
# in which most of that cancels: up to 1.5 %.
BF16_STEP_RTOL = 0.12
BF16_CURVE_RTOL = 0.03

# embeddings
POOLED = 2e-6  # a mean of up to 250 float32 values of about 1, added in another order

# accelerate
# The same training in float32 with sums in another order, 200 steps: 1e-6 is what rounding leaves of one step, and a
# plain run whose weights are moved by 1e-7 is that far away too, unless a ReLU or a tiny gradient under AdamW tips over
# (then it is 1e-3 and more, of both): the seed is one where neither does.
ACCELERATED_CURVE_RTOL = 1e-5
# The same in float64: 1e-16 and a few steps.
FLOAT64_RTOL = 1e-12

# A compiled or exported module takes the way of fixed shapes (bias, residual and LayerNorm in one pass) where an eager
# one on a CPU counts rows: the same sums in another order. Relative to the largest value; gradients that are a
# tenth of the largest one and less, to that: batch statistics cancel some of them but for rounding.
COMPILED_RTOL = 2e-5
# Under autocast against float32, relative to the largest value: a few roundings of 2^-9 or 2^-12; worst seen 0.0056 and
# 0.0006. Gradients under float16, all together by their norm: worst seen 0.0006.
AUTOCAST_RTOL = {"bfloat16": 0.03, "float16": 0.004}
AUTOCAST_GRADIENT_RTOL = 0.004
# Of the two systems: behind statistics over a dozen rows a ReLU here and there flips; seen 0.1 (bfloat16: 0.22).
AUTOCAST_HEADS_RTOL = 0.3

# EMATeacher: one rounding or two of values of about 1, for each of a few updates.
EMA_TEACHER = 1e-6
