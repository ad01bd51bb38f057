"""What each CUDA kernel may use, written down before it was compiled, and what its machine code must and must not hold.

tests/cuda/test_static.py compiles every csrc/*/*_cuda.cu for each architecture and holds it to this table: a kernel
without an entry fails, an entry without a kernel fails. No kernel may spill, have a stack frame, static shared memory
or local memory; that needs no entry.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """Of one kernel, whose name is ``<operator's folder>/<name>``; ``*`` stands for any template arguments.

    threads: per block as it is launched. registers: at most. shared: dynamic shared memory of a block in bytes, at
    most. float64: arithmetic instructions at most, none unless it is meant: they run at half the rate, or at a 64th.
    blocks: that a multiprocessor must hold at a time, at least: per architecture or for all. opcodes: how many
    instructions of a kind there must be (least, most; None: no bound): a modifier narrows ("LDG.128"), a sum widens
    ("FFMA+FMUL").
    """

    threads: int
    registers: int
    shared: int = 0
    float64: int = 0
    blocks: int | dict[int, int] = 1
    opcodes: dict[str, tuple[int, int | None]] = field(default_factory=dict)


SOME, NONE = (1, None), (0, 0)

# log_mel: the transform is straight-line code, so its float32 arithmetic is seen whole: 1,260 operations a lane at
# n_fft 1024 (log_mel_kernel.cuh), plus mel and decibels. No tensor cores: they do not hold 80 dB. Shared memory at hop
# 160 and 64 mels; two blocks on sm_90 and sm_100, one in the smaller shared memory of sm_80.
_MEL = {"HMMA+HGMMA": NONE, "LDS.128": SOME}
_FP32 = "FFMA+FADD+FMUL"
_TWO = {80: 1, 90: 2, 100: 2}
_ROOTS = 150  # float64 sines of the tables, once per block

BUDGET: dict[str, Budget] = {
    # the largest tile; 64 bins are one of 128 threads and 19 KiB
    "augment/augment_kernel": Budget(256, 48, shared=44 << 10, blocks={80: 3, 90: 5, 100: 5}),
    "ema/ema_kernel": Budget(
        threads=256,
        registers=64,
        float64=3,  # 1 - momentum, once
        blocks=4,
        opcodes={"LDG.128": (24, None), "STG.128": (12, None), "CALL": NONE},
    ),
    "ema/adamw_kernel": Budget(
        threads=256,
        registers=64,
        shared=48,
        float64=100,  # the step's factors, by one thread
        blocks=4,
        opcodes={"LDG.128": (18, None), "STG.128": (12, None)},
    ),
    "ema/norm_kernel": Budget(
        threads=256, registers=64, shared=2056, float64=400, blocks=4, opcodes={"LDG.128": (4, None)}
    ),
    # 128 filters at 16, 32 and 48 kHz
    "kaldi_fbank/kaldi_fbank_kernel<8>": Budget(256, 128, 112_784, _ROOTS, _TWO, _MEL | {_FP32: (1200, 1700)}),
    "kaldi_fbank/kaldi_fbank_kernel<16>": Budget(256, 128, 113_360, _ROOTS, _TWO, _MEL | {_FP32: (1300, 1800)}),
    "kaldi_fbank/kaldi_fbank_kernel<32>": Budget(256, 128, 124_368, _ROOTS, 1, _MEL | {_FP32: (1500, 2300)}),
    "log_mel/log_mel_kernel<8>": Budget(256, 128, 109_968, _ROOTS, _TWO, _MEL | {_FP32: (1100, 1500)}),
    "log_mel/log_mel_kernel<16>": Budget(256, 128, 100_944, _ROOTS, _TWO, _MEL | {_FP32: (1260, 1600)}),
    "log_mel/log_mel_kernel<32>": Budget(256, 128, 112_592, _ROOTS, _TWO, _MEL | {_FP32: (1600, 2400)}),
}
