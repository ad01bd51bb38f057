"""What a checkpoint holds, also one that `load_checkpoint` refuses."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from atst_fast.integrations.checkpoint import load_network
from atst_fast.integrations.checkpoint_config import is_clip
from atst_fast.integrations.checkpoint_file import Content, read
from atst_fast.integrations.checkpoint_layout import LAYOUTS, Layout, Network, recognise
from atst_fast.models.weights import CheckpointError, is_finite


class NetworkReport(NamedTuple):
    """One encoder of a file.

    ``role``: "teacher", "student" or "" where it is the only one. ``method``: "frame" or "clip". ``prefix``: what its
    tensors' names begin with. ``parameters``: numbers in them. ``config`` and ``front_end``: what `load_checkpoint`
    would build, None where it would not; ``fault``: why not. ``heads``: how many tensors besides it the network has, by
    the first part of their names.
    """

    role: str
    method: str
    prefix: str
    parameters: int
    config: dict[str, Any] | None
    front_end: dict[str, Any] | None
    heads: dict[str, int]
    fault: CheckpointError | None


class Inspection(NamedTuple):
    """What `inspect_checkpoint` found.

    ``size`` in bytes; ``container``: see ``checkpoint_file.Content``; ``layout``: a name in ``LAYOUTS``, "" where no
    encoder is in it, and ``description``, what that means; ``others``: names of tensors that belong to no network;
    ``dtypes``: tensors of each; ``not_finite``: names of those with such values; ``tensors``: all of them; ``config``:
    what else the file says.
    """

    path: Path
    size: int
    container: str
    layout: str
    description: str
    networks: list[NetworkReport]
    others: tuple[str, ...]
    dtypes: dict[str, int]
    not_finite: tuple[str, ...]
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def inspect_checkpoint(path: str | Path, *, num_heads: int | None = None) -> Inspection:
    """What the file (or folder) ``path`` holds. ``CheckpointError`` only where it cannot be read at all, or would run
    code; what else is wrong with it is in the result. ``num_heads``: see `load_checkpoint`."""
    path = Path(path)
    content = read(path)
    files = path.iterdir() if path.is_dir() else [path]
    try:
        layout = recognise(content, path)
        described, networks = (
            LAYOUTS[layout.name],
            [_report(content, layout, n, num_heads, path) for n in layout.networks],
        )
    except CheckpointError as error:
        layout, described, networks = Layout("", (), tuple(content.tensors)), str(error), []
    return Inspection(
        path=path,
        size=sum(f.stat().st_size for f in files if f.is_file()),
        container=content.container,
        layout=layout.name,
        description=described,
        networks=networks,
        others=layout.others,
        dtypes=dict(Counter(str(x.dtype).removeprefix("torch.") for x in content.tensors.values()).most_common()),
        not_finite=tuple(name for name, x in content.tensors.items() if not is_finite(x)),
        tensors=content.tensors,
        config=content.config,
    )


def _report(content: Content, layout: Layout, network: Network, num_heads: int | None, path: Path) -> NetworkReport:
    weights = {k: content.tensors[network.prefix + k] for k in network.keys}
    config = front_end = fault = None
    try:
        encoder, front_end = load_network(content, layout, network, num_heads, path)
        config = encoder.config
    except CheckpointError as error:
        fault = error
    return NetworkReport(
        role=network.role,
        method="clip" if is_clip(weights) else "frame",
        prefix=network.prefix,
        parameters=sum(w.numel() for w in weights.values()),
        config=config,
        front_end=front_end,
        heads=dict(Counter(name.split(".")[0] for name in network.heads)),
        fault=fault,
    )
