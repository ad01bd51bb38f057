"""The systems that golden cases were computed with."""

from atst_fast.models import ATSTClip, ATSTFrame
from atst_fast.optim import AdamWEMA, param_groups
from atst_fast.train.schedule import Schedules
from tests.golden import load


def frame_step(**options):
    """The ATSTFrame of ``frame_step`` and ``frame_step5``, and its schedules."""
    return _system(ATSTFrame, "frame_step", **options)


def clip_step(**options):
    """The ATSTClip of ``clip_step`` and ``clip_step5``, and its schedules."""
    return _system(ATSTClip, "clip_step", **options)


def _system(build, name, **options):
    t, meta = load(name)
    c = meta["cfg"]
    system = build(
        {"dim": c["dim"], "depth": c["depth"], "num_heads": c["heads"]},
        hidden=c["hid"],
        out=c["proj"],
        mlp_ratio=c["mlp_ratio"],
        max_frames=c["spec_w"],
        drop_path_rate=0.0,
        **options,
    )
    system.load_state_dict({k.removeprefix("in/state/"): v for k, v in t.items() if k.startswith("in/state/")})
    return system, Schedules(steps=c["maxs"], lr=c["lr"], warmup_steps=c["warm"], momentum=c["ema"])


def optimizer_of(system):
    """The official one, which moves the teacher too."""
    teacher = dict(zip(*system.teacher_pairs()))
    return AdamWEMA(param_groups(system.student, 0.04), form="hf", eps=1e-6, teacher=teacher)


def set_rates(optimizer, rates):
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = rates.lr
        group["weight_decay"] = rates.weight_decay if i == 0 else 0.0
    optimizer.momentum = rates.momentum
