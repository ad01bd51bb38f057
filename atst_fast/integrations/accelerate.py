"""Fused forwards for models that exist: audiossl's ATST, and pre-norm ViT blocks of other code."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from atst_fast.integrations import accelerate_probe as probe
from atst_fast.integrations.accelerate_block import AttentionPlan, BlockPlan, FusedAttention, FusedBlock, plain
from atst_fast.integrations.accelerate_encoder import (
    EncoderPlan,
    FusedClipEncoder,
    FusedEncoder,
    FusedFrameEncoder,
    check_arguments,
    encoder_kind,
    patch_layer,
)
from atst_fast.integrations.accelerate_match import (
    Call,
    Roles,
    Unknown,
    at,
    attention_roles,
    block_roles,
    changed,
    looks_like_attention,
    looks_like_block,
)
from atst_fast.integrations.accelerate_probe import Unlike
from atst_fast.integrations.accelerate_report import Entry, Report
from atst_fast.integrations.accelerate_swap import Fused, fused_class, is_fused, obstacle, swap, unswap
from atst_fast.integrations.accelerate_system import (
    FusedHead,
    FusedLoss,
    FusedTeacher,
    LossPlan,
    check_head,
    check_teacher,
    is_head,
    is_system,
    loss_views,
)

# Few where all settings are compared, and once as many as show an attention that is limited to neighbours.
_TOKENS, _MANY_TOKENS = 7, 600
_VALID = (7, 3, 1, 0)


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    patch_embed: bool = True,
    block: bool = True,
    heads: bool = True,
    loss: bool = True,
    teacher: bool = True,
) -> Report:
    """Let the parts of ``model`` that atst_fast knows run its operators, in place; returns a report of all parts.

    Parameters, buffers, state-dict keys, hooks and the random numbers that are drawn stay as they are: an optimizer
    that holds the parameters goes on, and so do checkpoints. What changes is the class of some modules (see
    ``restore``). Call it before or after DDP, ``torch.compile``, FSDP2 or Lightning wrap the model, and again whenever
    you like: the last call's arguments are what counts.

    Args:
        model: audiossl's FrameATST or ATST, their encoders FrameAST and AST, a Lightning module, DDP or compiled module
            that holds one, or anything else with pre-norm transformer blocks: those of timm, SSAST, ASiT and
            HuggingFace's AST. They are found by their layers and not by their names, and each kind is compared with its
            original first, in float64, on a copy with random weights and on up to 600 tokens: nothing that computes
            anything else there is replaced.
        attention: the attention of the blocks; and attention modules that return a tensor, outside of such blocks.
        patch_embed: patches, mask token and positions of FrameAST and AST in one operator.
        block: the rest of the blocks (bias, GELU, stochastic depth, residual, LayerNorm), and of the last block of
            FrameAST and AST the rows alone that are read.
        heads: batch norm and ReLU of projector and predictor. loss: ByolLoss, compared with the original on its first
            batch. teacher: ``update_teacher`` in one call.

    Left as they are, and the report says why: modules with parameters, norms or dropout that are not those of such a
    block (LayerScale, relative positions, a dropout above 0); containers with hooks; what sets an attribute when it
    runs, or does not run in float64 (quantised layers). A layer that is more than ``nn.Linear`` (LoRA) and an
    activation other than the exact GELU are called as they are, within the fused block. A call that asks for more than
    the fused forward has, such as ``return_attention=True``, runs the original forward, as does a block in which a
    module is given a hook or a forward of its own later, or is replaced by another kind.

    Numbers are those of the original up to float32 rounding: sums are added in another order. (A clip without a valid
    token attends to its padding, as there; the original adds -10000 to those scores, which rounds them to 1e-3 and in
    bfloat16 to nothing, and these are not rounded.) Gradients are of first
    order. Under autocast the residual stream keeps its dtype, and the patch embedding is computed in that of its
    weights. A copy, a pickle or a replica of an accelerated model is accelerated too; TorchScript must come before, and
    such a module is left.

    Raises:
        TypeError: ``model`` is no module, an argument no bool. RuntimeError: as ``restore``.
    """
    flags = {
        "attention": attention, "patch_embed": patch_embed, "block": block,
        "heads": heads, "loss": loss, "teacher": teacher,
    }  # fmt: skip
    _check_module("accelerate", model)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"accelerate: {name} must be True or False, got {value!r}")
    restore(model)
    search = _Search(flags)
    # names of modules before anything is swapped; a module that occurs twice has one name and is swapped once
    named = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            named.append((name, module))
        elif not isinstance(_parent(model, name), torch.jit.ScriptModule):
            search.entries.append(Entry(name, "module", False, "it is TorchScript"))
    try:
        with torch.device("cpu"):  # whatever the caller makes tensors on
            for kind in (search.block, search.attention, search.encoder, search.head, search.loss, search.teacher):
                for name, module in named:
                    kind(name, module)
    except BaseException:
        restore(model)
        raise
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return Report(sorted(search.entries, key=lambda entry: order[entry.name]))


def restore(model: nn.Module) -> int:
    """Give every module that `accelerate` changed its own class back; returns how many there were.

    Nothing else has been changed, so that nothing else has to be put back. Raises TypeError where ``model`` is no
    module, RuntimeError where another library has replaced the class of a fused module since (FSDP2's ``fully_shard``,
    a parametrisation): nothing is restored then.
    """
    _check_module("restore", model)
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, Fused) and not is_fused(module):
            unswap(module)  # which says why it cannot be done
    return sum(unswap(module) for module in modules)


@contextlib.contextmanager
def accelerated(model: nn.Module, **flags: bool) -> Iterator[Report]:
    """``with accelerated(model) as report:`` accelerates within the block, and restores whatever happens there.

    A model that was accelerated before is not accelerated after it. Arguments and errors as `accelerate`.
    """
    report = accelerate(model, **flags)
    try:
        yield report
    finally:
        restore(model)


def _parent(model: nn.Module, name: str) -> nn.Module | None:
    return at(model, name.rpartition(".")[0]) if name else None


def _check_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


class _Search:
    """One pass over a model: what each module is, and whether what would replace it does the same."""

    def __init__(self, flags: dict[str, bool]):
        self.flags = flags
        self.entries: list[Entry] = []
        self._inside: set[int] = set()  # attention modules that are parts of fused blocks
        self._known: dict[tuple, tuple | str] = {}  # by description: a mixin and its plan, or why not

    def _take(self, name: str, part: str, module: nn.Module, find: Callable, note: Callable) -> bool:
        """Swap ``module`` for what ``find`` says of modules of its description; enter it in the report."""
        why = obstacle(module)
        if why is None:
            key = (part, probe.described(module))
            if key not in self._known:
                try:
                    self._known[key] = find(module)
                    fused_class(type(module), *self._known[key])
                except (Unknown, Unlike) as error:
                    self._known[key] = str(error)
                except Exception as error:  # what code of others may raise where it is looked at
                    self._known[key] = f"it cannot be tried out: {probe.first_line(error)}"
            found = self._known[key]
            if isinstance(found, tuple):
                swap(module, *found)
                self.entries.append(Entry(name, part, True, note(module, found[1])))
                return True
            why = found
        self.entries.append(Entry(name, part, False, why))
        return False

    def block(self, name: str, module: nn.Module) -> None:
        if not looks_like_block(module):
            return
        if not (self.flags["attention"] or self.flags["block"]):
            self.entries.append(Entry(name, "block", False, "attention=False and block=False"))
        elif self._take(name, "block", module, self._find_block, _block_note):
            self._inside |= {id(child) for child in module.modules()}

    def _find_block(self, module: nn.Module) -> tuple:
        roles, call = block_roles(module), Call.of(module)
        if path := changed(module, roles):
            raise Unknown(f"{path} has a hook, or a forward of its own")
        owner = at(module, roles.owner.split(".")[0])
        masked = len(Call.of(owner).names) > 1 and "mask" in Call.of(owner).names[1]
        copied = probe.replica(module)
        form = _try_out(copied.eval(), roles)
        plan = BlockPlan(roles, call, form, self.flags["attention"], self.flags["block"], masked)
        lengths = [None] if call.length is None else [None, torch.tensor(_VALID)]
        for training in (False, True):
            for length in lengths:
                more = {} if length is None else {call.length: length}
                for fixed in (False, True):
                    _compare(copied.train(training), FusedBlock, plan, (_input(roles),), more, fixed)
        _compare(copied.eval(), FusedBlock, plan, (_input(roles, 1, _MANY_TOKENS),), {})
        return FusedBlock, plan

    def attention(self, name: str, module: nn.Module) -> None:
        if id(module) in self._inside or not looks_like_attention(module):
            return
        if not self.flags["attention"]:
            self.entries.append(Entry(name, "attention", False, "attention=False"))
        else:
            self._take(name, "attention", module, _find_attention, lambda *_: "ops.frame_attention")

    def encoder(self, name: str, module: nn.Module) -> None:
        if encoder_kind(module) is None:
            return
        if not (self.flags["patch_embed"] or self.flags["block"]):
            self.entries.append(Entry(name, "encoder", False, "patch_embed=False and block=False"))
        else:
            self._take(name, "encoder", module, self._find_encoder, _encoder_note)

    def _find_encoder(self, module: nn.Module) -> tuple:
        kind = encoder_kind(module)
        layer, kind_of_layer = patch_layer(module)
        rows = self.flags["block"] and self.flags["attention"]
        plan = EncoderPlan(layer, kind_of_layer, self.flags["patch_embed"], rows)
        mixin = FusedFrameEncoder if kind == "frame" else FusedClipEncoder
        check_arguments(module, mixin)
        _compare_encoder(module, kind, mixin, plan)
        return mixin, plan

    def head(self, name: str, module: nn.Module) -> None:
        if is_head(module):
            self._flagged(name, "head", "heads", module, _find_head, "ops.batch_norm_relu")

    def loss(self, name: str, module: nn.Module) -> None:
        try:
            views = loss_views(module)
        except Unknown as error:
            self.entries.append(Entry(name, "loss", False, str(error)))
            return
        if views is not None:
            found = FusedLoss, LossPlan(views, probe.described(module))
            note = "ops.frame_loss, if it agrees with the original on the first batch"
            self._flagged(name, "loss", "loss", module, lambda _: found, note)

    def teacher(self, name: str, module: nn.Module) -> None:
        if is_system(module):
            self._flagged(name, "teacher", "teacher", module, _find_teacher, "update_teacher by ops.ema_update_")

    def _flagged(self, name: str, part: str, flag: str, module: nn.Module, find: Callable, note: str) -> None:
        if self.flags[flag]:
            self._take(name, part, module, find, lambda *_: note)
        else:
            self.entries.append(Entry(name, part, False, f"{flag}=False"))


def _find_attention(module: nn.Module) -> tuple:
    roles, call = attention_roles(module), Call.of(module)
    if path := changed(module, roles):
        raise Unknown(f"{path} has a hook, or a forward of its own")
    copied = probe.replica(module).eval()
    form = _try_out(copied, roles)
    plan = AttentionPlan(roles, call, form)
    for training in (False, True):
        _compare(copied.train(training), FusedAttention, plan, (_input(roles),), {})
    _compare(copied.eval(), FusedAttention, plan, (_input(roles, 1, _MANY_TOKENS),), {})
    return FusedAttention, plan


def _find_head(module: Any) -> tuple:
    check_head(module)
    copied = probe.replica(module).train()
    other = probe.replica(module).train()
    swap(other, FusedHead, ())
    x = probe.random(torch.Generator("cpu").manual_seed(1), 6, int(module[0].in_features))
    probe.compare("its output", probe.run(copied, x), probe.run(other, x))
    probe.compare("its running statistics", list(copied.buffers()), list(other.buffers()))
    return FusedHead, ()


def _find_teacher(module: nn.Module) -> tuple:
    check_teacher(module)
    return FusedTeacher, ()


def _input(roles: Roles, clips: int = len(_VALID), tokens: int = _TOKENS) -> Tensor:
    return probe.random(torch.Generator("cpu").manual_seed(1), clips, tokens, roles.dim)


def _try_out(copied: nn.Module, roles: Roles) -> int:
    """What the replica returns, see `_form`; `Unknown` where it also keeps something for others to read."""
    before = probe.attributes(copied)
    form = _form(probe.run(copied, _input(roles)))
    if kept := probe.difference(before, probe.attributes(copied)):
        raise Unknown(f"its forward sets {kept}")
    return form


def _form(result: object) -> int:
    """-1: a tensor; n: a tuple of it and n times None."""
    if isinstance(result, Tensor):
        return -1
    if type(result) is tuple and result and isinstance(result[0], Tensor):
        if all(x is None for x in result[1:]):
            return len(result) - 1
        raise Unknown("it returns its attention matrix, which the operator never forms")
    raise Unknown(f"it returns {type(result).__name__}")


def _compare(copied: nn.Module, mixin, plan, args: tuple, kwargs: dict, fixed: bool = False) -> None:
    """Raise `Unlike` unless the fused forward of a replica gives what its own gives, the same draws included."""
    drops = copied.training and bool(plan.roles.drops)
    for seed in (0, 1) if drops else (0,):
        want = probe.run(copied, *args, seed=seed, **kwargs)
        swap(copied, mixin, plan)
        if fixed:
            vars(copied)["fixed_shapes"] = True
        try:
            got = probe.run(copied, *args, seed=seed, **kwargs)
        finally:
            vars(copied).pop("fixed_shapes", None)
            unswap(copied)
        probe.compare("what it computes", want, got, probe.PROBE_FACTORS_RTOL if drops else probe.PROBE_RTOL)


def _compare_encoder(module: Any, kind: str | None, mixin: type[FusedEncoder], plan: EncoderPlan) -> None:
    """The same of a whole encoder, of which the first and the last block do."""
    depth = len(module.blocks)
    blocks: Any = nn.ModuleList(probe.replica(module.blocks[i]) for i in sorted({0, depth - 1}) if i >= 0)
    copied = probe.replica(module, {id(module.blocks): blocks})
    generator = torch.Generator("cpu").manual_seed(1)
    ph, pw = (int(getattr(module.patch_embed, side)) for side in ("patch_height", "patch_width"))
    height = int(getattr(module, "spec_h", ph))
    mel = probe.random(generator, 4, 1, height, 6 * pw + 1)
    length = torch.tensor([6 * pw + 1, 4 * pw + 1, pw, 3 * pw])
    mask = torch.rand(4, 6 * (height // ph), generator=generator) < 0.6
    mask[:, 0] = True
    plans = [(b, type(b).mixin, b.plan) for b in blocks if is_fused(b)]
    for training in (False, True):
        copied.train(training)
        for masked in (True, False):
            calls = [{"mask_index": mask, "mask_input": masked}] if kind == "frame" else [{}]
            wanted = []
            for b, *_ in plans:
                unswap(b)
            wanted = _results(copied, mel, length, mask, masked, calls)
            for b, *rest in plans:
                swap(b, *rest)
            swap(copied, mixin, plan)
            try:
                rtol = probe.PROBE_FACTORS_RTOL if training else probe.PROBE_RTOL
                for fixed in (False, True):
                    vars(copied)["fixed_shapes"] = fixed
                    got = _results(copied, mel, length, mask, masked, calls)
                    probe.compare("what it computes", wanted, got, rtol)
            finally:
                vars(copied).pop("fixed_shapes", None)
                unswap(copied)


def _results(encoder: Any, mel: Tensor, length: Tensor, mask: Tensor, masked: bool, calls: list[dict]) -> list:
    prepared = probe.run(encoder.prepare_tokens, mel, mask, length, masked)
    return [prepared, *(probe.run(encoder, mel, length=length, **call) for call in calls)]


def _block_note(module: nn.Module, plan: BlockPlan) -> str:
    parts = (["attention"] if plan.attention else []) + (["MLP, residuals, norms"] if plan.rest else [])
    roles, called = plan.roles, []
    for path in (*roles.qkv, roles.proj, roles.fc1, roles.fc2):
        if not plain(at(module, path)):
            called.append(f"{path} ({type(at(module, path)).__name__})")
    if roles.act is not None and not roles.gelu:
        called.append(f"{roles.act} ({type(at(module, roles.act)).__name__})")
    return " and ".join(parts) + (f"; called as they are: {', '.join(called)}" if called else "")


def _encoder_note(module: nn.Module, plan: EncoderPlan) -> str:
    return " and ".join((["patch embedding"] if plan.tokens else []) + (["last block"] if plan.rows else []))
