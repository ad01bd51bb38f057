"""Tables of embeddings of many files, larger than the memory: safetensors, NumPy's .npz or Parquet."""

import contextlib
import json
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atst_fast.train.config import UserError
from atst_fast.train.files import write_atomically

_BLOCK = 2**20  # values that are copied at once
_HEADER = 90_000_000  # bytes; safetensors files may not have a header of more than 100 MB


class Block(NamedTuple):
    """Rows ``values`` float32 ``[n, width]`` of file number ``file``; they are its rows ``first`` and following."""

    file: int
    first: int
    values: NDArray[np.float32]


class Rows:
    """Rows of ``width`` float32 values of several files, on the disk of ``folder``: they are added in any order and
    come back by file and place. A context manager; the space is given back at its end, also when it is killed."""

    def __init__(self, folder: Path, width: int):
        self.width = width
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 (closed in __exit__)
        self._entries = array("q")  # file, place, first row here, rows; of millions of files too
        self._total = 0

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a full disk
            self._file.close()

    def add(self, file: int, place: int, values: NDArray[np.float32]) -> None:
        self._file.seek(self._total * self.width * 4)
        self._file.write(np.ascontiguousarray(values, "<f4").data)
        self._entries.extend((file, place, self._total, len(values)))
        self._total += len(values)

    def counts(self) -> dict[int, int]:
        """How many rows each file has, by ascending file."""
        table = self._table()
        files, inverse = np.unique(table[:, 0], return_inverse=True)
        return dict(zip(files.tolist(), np.bincount(inverse, table[:, 3]).astype(np.int64).tolist()))

    def blocks(self) -> Iterator[Block]:
        """All rows by file and place, a bounded number at once."""
        most, before, row = max(1, _BLOCK // self.width), -1, 0
        for file, _, start, n in self._table().tolist():
            if file != before:
                before, row = file, 0
            for at in range(0, n, most):
                part = min(most, n - at)
                self._file.seek((start + at) * self.width * 4)
                data = self._file.read(part * self.width * 4)
                yield Block(file, row, np.frombuffer(data, "<f4").reshape(part, self.width))
                row += part

    def _table(self) -> NDArray[np.int64]:
        table = np.array(self._entries, np.int64).reshape(-1, 4)
        return table[np.lexsort((table[:, 1], table[:, 0]))]


def writer_of(path: Path) -> Callable[[Path, Rows, Sequence[str], dict[str, Any]], None]:
    """What writes the format that the name ends in; UserError where there is none, ImportError without its package."""
    writers = {".safetensors": _write_safetensors, ".npz": _write_npz, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise UserError(f"--out must end in {', '.join(writers)}, got {path}")
    if path.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401 (now, and not when all the work is done)
    return writers[path.suffix]


def write(path: Path, rows: Rows, names: Sequence[str], about: dict[str, Any]) -> None:
    """Write all rows to ``path``; it appears when it is complete. ``names``: of every file by its number.

    ``about``: plain values that say where the embeddings come from; ``hop_ms`` among them if a file has many.
    """
    write_one = writer_of(path)
    printable = [
        names[file].encode(errors="surrogateescape").decode(errors="backslashreplace") for file in rows.counts()
    ]
    write_atomically(path, lambda p: write_one(p, rows, printable, about))


def _offsets(rows: Rows) -> NDArray[np.int64]:
    return np.cumsum([0, *rows.counts().values()], dtype=np.int64)


def _write_safetensors(path: Path, rows: Rows, names: Sequence[str], about: dict[str, Any]) -> None:
    """``embeddings [rows, width]`` and ``offsets [files + 1]``; names and ``about`` as JSON in the metadata."""
    offsets = _offsets(rows)
    size = int(offsets[-1]) * rows.width * 4
    header = {
        "__metadata__": {"format": "pt", "names": json.dumps(names), "about": json.dumps(about)},
        "embeddings": {"dtype": "F32", "shape": [int(offsets[-1]), rows.width], "data_offsets": [0, size]},
        "offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [size, size + offsets.nbytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER:
        raise UserError(f"{len(names)} names are too many for a safetensors file; use .npz or .parquet")
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for block in rows.blocks():
            f.write(block.values.data)
        f.write(offsets.astype("<i8").data)


def _write_npz(path: Path, rows: Rows, names: Sequence[str], about: dict[str, Any]) -> None:
    """``embeddings``, ``offsets`` as in safetensors, ``names [files]`` and ``about`` (JSON) as strings."""
    offsets = _offsets(rows)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as f:
            shape = int(offsets[-1]), rows.width
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for block in rows.blocks():
                f.write(block.values.data)
        for name, values in (("offsets", offsets), ("names", np.array(names)), ("about", np.array(json.dumps(about)))):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array(f, values, allow_pickle=False)


def _write_parquet(path: Path, rows: Rows, names: Sequence[str], about: dict[str, Any]) -> None:
    """A row per embedding: ``file`` (its name), ``ms`` (when it starts) and ``embedding``, a list of ``width`` float32
    values; ``about`` as JSON in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name_of = dict(zip(rows.counts(), names, strict=True))
    fields = [("file", pa.string()), ("ms", pa.float64()), ("embedding", pa.list_(pa.float32(), rows.width))]
    schema = pa.schema(fields, {"about": json.dumps(about)})
    with pq.ParquetWriter(path, schema) as out:
        for group in _grouped(rows.blocks(), max(1, _BLOCK // rows.width)):
            values = pa.array(np.concatenate([block.values.reshape(-1) for block in group]))
            at = np.concatenate([block.first + np.arange(len(block.values)) for block in group])
            text = pa.array([name_of[block.file] for block in group for _ in block.values])
            ms = pa.array(at * float(about.get("hop_ms", 0)))
            columns = [text, ms, pa.FixedSizeListArray.from_arrays(values, rows.width)]
            out.write_table(pa.table(columns, schema=schema))


def _grouped(blocks: Iterator[Block], most: int) -> Iterator[list[Block]]:
    """Neighbours together, up to about ``most`` rows: scenes come one by one."""
    group: list[Block] = []
    n = 0
    for block in blocks:
        group.append(block)
        n += len(block.values)
        if n >= most:
            yield group
            group, n = [], 0
    if group:
        yield group
