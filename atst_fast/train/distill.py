"""``atst-fast distill``: ATST-C2F, an ATST-Frame that learns from labels and from a fine-tuned ATST-Clip."""

from typing import Any

from torch import Tensor

from atst_fast.models import Distilled, FrameEncoder, distill_loss
from atst_fast.train import run
from atst_fast.train.config import UserError
from atst_fast.train.finetune import FinetuneRun
from atst_fast.train.finetune_config import DistillConfig, check
from atst_fast.train.tagger import load_tagger, pretrained


def distill(config: DistillConfig) -> int:
    """As `finetune`, also under ``torchrun``."""
    check(config)
    return run.execute(DistillRun, config)


class DistillRun(FinetuneRun):
    doing = "distilling into"
    config: DistillConfig

    def build(self) -> tuple[Distilled, dict[str, Any]]:
        c = self.config
        teacher, labels, front_end = load_tagger(c.teacher)
        student, own = pretrained(c.checkpoint, c.encoder, c.drop_path)
        if not isinstance(student, FrameEncoder):
            raise UserError(f"--checkpoint must be an ATST-Frame, got an ATST-Clip: {c.checkpoint}")
        if teacher.level != c.level:
            raise UserError(f"--teacher {c.teacher} was fine-tuned at level {teacher.level}, and --level is {c.level}")
        if labels is not None and labels != self.task.labels:
            raise UserError(f"--teacher {c.teacher} has other labels than {c.data}: {labels} and {self.task.labels}")
        if teacher.config["classes"] != len(self.task.labels):
            counts = f"{teacher.config['classes']} and {len(self.task.labels)}"
            raise UserError(f"--teacher {c.teacher} has another number of labels than {c.data}: {counts}")
        if own != front_end:
            raise UserError(f"--checkpoint and --teacher must have one front end, got {own} and {front_end}")
        quiet = self.settings["teacher_mode"] == "eval"
        model = Distilled(teacher, student, project=c.project, teacher_eval=quiet, chunk_frames=self.chunk_frames)
        return model, own

    def losses(self, mel: Tensor, lengths: Tensor, targets: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        out = distill_loss(self.working(mel, lengths), targets, self.settings["loss"], self.config.weight, valid)
        return out._asdict()
