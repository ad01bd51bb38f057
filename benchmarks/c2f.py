"""ATST-C2F beside what it is made of: ``python -m benchmarks.c2f --data demo_data --out runs/c2f``.

Pretrains a tiny ATST-Clip and a tiny ATST-Frame on the same audio for the same number of steps; then, for each seed and
for labels of whole clips and of frames: fine-tunes either, and distils the fine-tuned ATST-Clip into the pretrained
ATST-Frame. The table has the test scores of all of them, mean and deviation over seeds; ``c2f.json`` each number.

A seed draws the files held out, the head, the batches and what is mixed; the two pretrained encoders are one each. All
runs can be stopped and go on; what is complete is not repeated.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from atst_fast.train.config import PretrainConfig
from atst_fast.train.distill import distill
from atst_fast.train.files import write_atomically
from atst_fast.train.finetune import SCORES, finetune
from atst_fast.train.finetune_config import DistillConfig, FinetuneConfig
from atst_fast.train.metrics import METRICS
from atst_fast.train.pretrain import pretrain

SYSTEMS = ("fine-tuned ATST-Clip", "fine-tuned ATST-Frame", "distilled ATST-Frame (C2F)")
LEVELS = ("clip", "frame")
# Two seconds are what two cores can pretrain on in minutes; longer scenes go through the encoders in such pieces, which
# the official division of the means was not meant for.
SECONDS = 2.0
PRETRAIN = {"arch": "tiny", "batch_size": 32, "clip_seconds": SECONDS, "lr": 4e-3, "momentum": 0.99, "hidden": 1024}
PRETRAIN |= {"bank_size": 512, "final_weight_decay": 0.04, "drop_path": 0.0, "log_every": 50}
# The published learning rates (about 1 per 256 clips) are for thousands of steps; here there are 200. The files that
# seed 0 holds out prefer 8 to 2, tried with ATST-Frame. After a warm-up of 15 steps only, frames do not recover from
# the first large ones.
FINETUNE = {"batch_size": 16, "lr": 8.0, "chunk_seconds": SECONDS}
FINETUNE |= {"log_every": 50, "eval_every": 1000, "save_every": 20}


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.c2f", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("demo_data"), help="what `atst-fast demo-data` made")
    parser.add_argument("--out", type=Path, default=Path("runs/c2f"), help="folder of all runs, c2f.json among them")
    parser.add_argument("--steps", type=int, default=1000, help="of each pretraining")
    parser.add_argument("--epochs", type=int, default=40, help="of each fine-tuning and distillation")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args(arguments)


def done(code):
    """Go on after a command that finished; leave as it did after one that was stopped."""
    if code:
        sys.exit(code)


def pretrained(options):
    """Folders of the runs of both methods."""
    runs = {method: options.out / f"pretrain-{method}" for method in LEVELS}
    for method, out in runs.items():
        crops = {"positive_seconds": SECONDS} if method == "clip" else {}
        config = PretrainConfig(
            data=options.data / "pretrain", out=out, method=method, steps=options.steps, **crops, **PRETRAIN
        )
        done(pretrain(config))
    return runs


def systems(options, starts, level, seed):
    """Test scores of the three systems."""
    outs = [options.out / f"{level}-{name}-{seed}" for name in ("clip", "frame", "distilled")]
    shared = {"data": options.data, "level": level, "seed": seed, "epochs": options.epochs, **FINETUNE}
    shared["warmup_epochs"] = max(options.epochs // 4, 1)
    means = {"scale_bug": False} if level == "clip" else {}
    done(finetune(FinetuneConfig(checkpoint=starts["clip"], out=outs[0], **shared, **means)))
    done(finetune(FinetuneConfig(checkpoint=starts["frame"], out=outs[1], **shared)))
    done(distill(DistillConfig(checkpoint=starts["frame"], teacher=outs[0], out=outs[2], **shared)))
    return [json.loads((out / SCORES).read_text())["test"] for out in outs]


def compare(options):
    """Scores by system and metric, a list over seeds."""
    starts = pretrained(options)
    results = {name: {} for name in SYSTEMS}
    for level in LEVELS:
        for seed in range(options.seeds):
            for name, scores in zip(SYSTEMS, systems(options, starts, level, seed), strict=True):
                for metric, value in scores.items():
                    results[name].setdefault(metric, []).append(value)
    return results


def table(results):
    """Markdown: a row for each system, mean ± deviation over seeds."""
    metrics = list(next(iter(results.values())))
    lines = [f"| test scores | {' | '.join(METRICS[m] for m in metrics)} |", "|---|" + "---|" * len(metrics)]
    for name, values in results.items():
        cells = [f"{statistics.mean(v):.3f} ± {spread(v):.3f}" for v in values.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main(arguments=None):
    options = parse(arguments)
    results = compare(options)
    record = {"options": {k: str(v) for k, v in vars(options).items()}, "results": results}
    write_atomically(options.out / "c2f.json", lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))
    print(table(results))


if __name__ == "__main__":
    main()
