"""The systems that golden cases were computed with."""

from atst_fast.models import ATSTFrame
from atst_fast.train.schedule import Schedules
from tests.golden import load


def frame_step(**options):
    """The ATSTFrame of ``frame_step`` and ``frame_step5``, and its schedules."""
    t, meta = load("frame_step")
    c = meta["cfg"]
    system = ATSTFrame(
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
