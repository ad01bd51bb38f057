"""The pictures of a result: that there are those that its cases make, whole."""

import struct

import pytest

from tests.bench.fake import case, cpu_result, gpu_result

pytest.importorskip("matplotlib")
from atst_fast.bench import plot


def size(path):
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def test_bars_and_roofline(tmp_path):
    result = gpu_result()
    assert plot.pictures(result, tmp_path / "new") == [tmp_path / "new" / n for n in ("times.png", "roofline.png")]
    assert all(min(size(path)) > 200 for path in (tmp_path / "new").iterdir())
    for c in result["cases"]:
        del c["extra_info"]["flops"]
    assert not plot.roofline(result, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def curve(axis, n, provider, way="forward"):
    more = {"way": way, axis: n}
    return case(provider, n * 1e-3, "small", group=f"op over {axis}", more=more, bytes=1, flops=1)


def test_curves_are_pictures_of_their_own(tmp_path):
    cases = [
        curve(axis, n, provider, way)
        for axis in ("frames", "threads")
        for n in (1, 2, 4)
        for provider in ("atst_fast", "peer")
        for way in ("forward", "backward")
    ]
    assert [p.name for p in plot.pictures(cpu_result(*cases), tmp_path)] == ["scaling-op.png"]
    wide = size(tmp_path / "scaling-op.png")[0]
    plot.pictures(cpu_result(*cases[:6]), tmp_path)
    assert size(tmp_path / "scaling-op.png")[0] < wide
    names = [p.name for p in plot.pictures(cpu_result(*cases, case("atst_fast", 1.0)), tmp_path)]
    assert names == ["times.png", "scaling-op.png"]


def test_nothing_is_drawn_of_nothing(tmp_path):
    assert plot.pictures(cpu_result(), tmp_path) == []


def test_what_is_under_the_roof():
    result = cpu_result(
        case("atst_fast", 1.0),
        case("atst_fast", 1.0, "tiny"),
        case("atst_fast", 1.0, more={"threads": 1}),
        case("atst_fast", 1.0, more={"threads": 2}),
        case("atst_fast", 1.0, group="op over batch"),
    )
    assert [plot._under_roof(c, result) for c in result["cases"]] == [True, False, False, True, False]
