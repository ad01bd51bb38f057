import json

import numpy as np
import pytest

from atst_fast.train import embedding_file
from atst_fast.train.config import UserError
from atst_fast.train.embedding_file import Rows, write, writer_of

ABOUT = {"kind": "timestamps", "hop_ms": 40.0}
FORMATS = ["safetensors", "npz", "parquet"]
NAMES = ["a.wav", "damaged.wav", "b/c d.wav", "caf\udce9.wav"]  # the last one is no UTF-8


def values(n, width=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


@pytest.fixture
def parts():
    """File -> its rows; of file 1 there are none."""
    return {0: values(7, seed=0), 2: values(1, seed=2), 3: values(4, seed=3)}


@pytest.fixture
def rows(tmp_path, parts):
    """They came out of order."""
    with Rows(tmp_path, 3) as rows:
        rows.add(3, 0, parts[3])
        rows.add(0, 1, parts[0][5:])
        rows.add(2, 0, parts[2])
        rows.add(0, 0, parts[0][:5])
        yield rows


def read(path):
    """(embeddings, offsets, names, about) of a file, by the public readers of its format."""
    if path.suffix == ".npz":
        with np.load(path) as f:
            return f["embeddings"], f["offsets"], f["names"].tolist(), json.loads(str(f["about"]))
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        of = table["file"].to_pylist()
        names = list(dict.fromkeys(of))
        offsets = np.cumsum([0, *(of.count(name) for name in names)])
        assert table["ms"].to_pylist() == [40.0 * i for n in np.diff(offsets) for i in range(n)]
        return np.array(table["embedding"].to_pylist(), np.float32), offsets, names, _about(table)
    from safetensors import safe_open

    with safe_open(path, framework="np") as f:
        about = f.metadata()
        return (
            f.get_tensor("embeddings"),
            f.get_tensor("offsets"),
            json.loads(about["names"]),
            json.loads(about["about"]),
        )


def _about(table):
    return json.loads(table.schema.metadata[b"about"])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("block", [2**20, 6])
def test_files_come_back_in_order(tmp_path, rows, parts, suffix, block, monkeypatch):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs the extra parquet")
    monkeypatch.setattr(embedding_file, "_BLOCK", block)
    path = tmp_path / f"out.{suffix}"
    write(path, rows, NAMES, ABOUT)
    embeddings, offsets, names, about = read(path)
    assert names == ["a.wav", "b/c d.wav", "caf\\xe9.wav"]
    assert about == ABOUT
    np.testing.assert_array_equal(offsets, [0, 7, 8, 12])
    np.testing.assert_array_equal(embeddings, np.concatenate(list(parts.values())))


def test_rows_wider_than_a_block_come_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_file, "_BLOCK", 2)
    with Rows(tmp_path, 3) as rows:
        rows.add(0, 0, values(2))
        assert [(b.first, len(b.values)) for b in rows.blocks()] == [(0, 1), (1, 1)]


def test_rows_can_be_added_after_they_were_read(tmp_path):
    with Rows(tmp_path, 3) as rows:
        rows.add(0, 0, values(2))
        next(rows.blocks())  # which leaves the file in its middle
        rows.add(1, 0, values(3, seed=1)[::-1])  # not contiguous
        np.testing.assert_array_equal(list(rows.blocks())[1].values, values(3, seed=1)[::-1])
        assert rows.counts() == {0: 2, 1: 3}


def test_the_tensors_of_a_safetensors_file_are_aligned(tmp_path, rows):
    for name in ("", "x", "xy", "xyz"):
        path = tmp_path / "out.safetensors"
        write(path, rows, NAMES, ABOUT | {"more": name})
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_scenes_in_parquet_have_no_times_and_come_in_groups(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    monkeypatch.setattr(embedding_file, "_BLOCK", 6)  # two rows
    with Rows(tmp_path, 3) as rows:
        for file in range(5):
            rows.add(file, 0, values(1, seed=file))
        write(tmp_path / "out.parquet", rows, list("abcde"), {"kind": "scene"})
    file = parquet.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 2, 1]
    table = file.read()
    assert table["file"].to_pylist() == list("abcde")
    assert table["ms"].to_pylist() == [0.0] * 5


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_error_leaves_what_was_there(tmp_path, rows, suffix, monkeypatch):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs the extra parquet")
    path = tmp_path / f"out.{suffix}"
    path.write_bytes(b"before")

    def full_disk(self):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(Rows, "blocks", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(path, rows, NAMES, ABOUT)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--out must end in .safetensors, .npz, .parquet, got .*out.csv"):
        writer_of(tmp_path / "out.csv")


def test_a_missing_package_is_noticed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError):
        writer_of(tmp_path / "out.parquet")


def test_a_header_beyond_safetensors_limit_is_refused(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(embedding_file, "_HEADER", 100)
    with pytest.raises(UserError, match=r"3 names are too many for a safetensors file; use .npz or .parquet"):
        write(tmp_path / "out.safetensors", rows, NAMES, ABOUT)
