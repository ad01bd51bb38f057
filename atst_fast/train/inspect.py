"""``atst-fast inspect``: what a checkpoint holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atst_fast.integrations import Inspection
    from atst_fast.integrations.checkpoint_inspect import NetworkReport

_METHODS = {"frame": "ATST-Frame", "clip": "ATST-Clip"}
_VALUE = 60  # characters of a value in the table


@dataclass(frozen=True)
class InspectConfig:
    """Layout, networks and contents of a checkpoint; exit code 1 where `load_checkpoint` would refuse one of them."""

    file: Path
    """a checkpoint of any layout, a folder of save_pretrained, or a run of `atst-fast pretrain`: its last checkpoint"""
    tensors: bool = False
    """list every tensor"""
    num_heads: int | None = None
    """heads of the attention, where neither the file says it nor the width (64 channels a head)"""


def inspect(config: InspectConfig) -> int:
    """Print what the file holds as tables."""
    from rich.console import Console

    from atst_fast.integrations import CheckpointError, inspect_checkpoint
    from atst_fast.train import checkpoint
    from atst_fast.train.config import UserError

    try:
        found = inspect_checkpoint(checkpoint.of_run(config.file), num_heads=config.num_heads)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    console = Console()
    console.print(_summary(found))
    for network in found.networks:
        console.print(_network(network))
        if network.fault is not None:
            _print_fault(console, network.fault)
    if found.config:
        console.print(_said(found.config))
    if config.tensors:
        console.print(_tensors(found))
    return int(not found.networks or any(n.fault for n in found.networks))


def _table(title: str, rows: Iterator[tuple[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left", min_width=60)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(str(value)))
    return table


def _summary(found: "Inspection") -> Any:
    def rows() -> Iterator[tuple[str, Any]]:
        yield "file", f"{found.path} ({_bytes(found.size)})"
        yield "layout", f"{found.layout}: {found.description}" if found.layout else found.description
        numbers = sum(x.numel() for x in found.tensors.values())
        dtypes = ", ".join(f"{count} {name}" for name, count in found.dtypes.items())
        yield "tensors", f"{len(found.tensors)} with {numbers:,} numbers ({dtypes})"
        if found.not_finite:
            yield "not finite", f"{len(found.not_finite)}: {', '.join(found.not_finite)}"
        if found.networks and found.others:
            yield "in no network", f"{len(found.others)}: {', '.join(found.others)}"

    return _table("checkpoint", rows())


def _network(network: "NetworkReport") -> Any:
    def rows() -> Iterator[tuple[str, Any]]:
        yield "encoder", f"{_METHODS[network.method]}, {network.parameters:,} parameters"
        yield "names", f"{network.prefix}*" if network.prefix else "without a prefix"
        if network.config is not None:
            yield from network.config.items()
        if network.front_end is not None:
            yield "front end", ", ".join(f"{k}={v}" for k, v in network.front_end.items())
        yield "heads", ", ".join(f"{name} ({n} tensors)" for name, n in network.heads.items()) or "none"
        yield "usable", "no" if network.fault else "yes"

    return _table(network.role or "network", rows())


def _print_fault(console: Any, fault: Any) -> None:
    """The message, and all tensors of a kind of which it shows the first ones only."""
    from atst_fast.models.weights import SHOWN

    console.print(str(fault), style="red", markup=False, highlight=False)
    for kind in ("missing", "extra", "misshapen", "not_finite"):
        keys = getattr(fault, kind)
        if len(keys) > SHOWN:
            console.print(f"{kind.replace('_', ' ')}: {', '.join(keys)}", markup=False, highlight=False)


def _said(config: dict[str, Any]) -> Any:
    def rows(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from rows(value, f"{before}{name}.")
            else:
                text = repr(value)
                yield before + name, text if len(text) <= _VALUE else f"{text[:_VALUE]} ..."

    return _table("what the file says", rows(config))


def _tensors(found: "Inspection") -> Any:
    shapes = ((k, f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}") for k, x in found.tensors.items())
    return _table("tensors", iter(shapes))


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
