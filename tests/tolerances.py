"""Every tolerance of the tests, with its reason. float32 against golden tensors: rounding of a sum of that length."""

# log_mel

# augment

# patch_embed

# frame_attention

# ema

# models

# train
