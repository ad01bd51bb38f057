"""What `accelerate` says it did."""

import re
from typing import NamedTuple


class Entry(NamedTuple):
    """One part of a model: its ``name`` in it, what ``part`` it is, whether it was ``replaced``, by what or why not."""

    name: str
    part: str
    replaced: bool
    note: str


class Report(list[Entry]):
    """The entries of all parts that were found, in the order of the model; ``str`` makes a table of them, in which
    parts that differ only in an index share a line."""

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self if entry.replaced]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self if not entry.replaced]

    def __str__(self) -> str:
        rows = [("part", "where", "what")]
        for (_, part, replaced, note), names in self._groups().items():
            done = f"{note}" if replaced else f"LEFT: {note}"
            rows.append((part, _span(names), done))
        if len(rows) == 1:
            return "accelerate: nothing in this model is known"
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{part:{widths[0]}}  {where:{widths[1]}}  {what}" for part, where, what in rows]
        counted = f"{len(self.replaced)} of {len(self)} parts replaced"
        return "\n".join([*lines, counted])

    def _groups(self) -> dict[tuple[str, str, bool, str], list[str]]:
        groups: dict[tuple[str, str, bool, str], list[str]] = {}
        for name, part, replaced, note in self:
            groups.setdefault((re.sub(r"\d+", "*", name), part, replaced, note), []).append(name)
        return groups


def _span(names: list[str]) -> str:
    """``blocks.0`` to ``blocks.11`` as ``blocks.0-11``."""
    if len(names) == 1:
        return names[0] or "(the model)"
    parts = [re.split(r"(\d+)", name) for name in names]
    columns = [[part[i] for part in parts] for i in range(len(parts[0]))]
    return "".join(c[0] if len(set(c)) == 1 else f"{c[0]}-{c[-1]}" for c in columns)
