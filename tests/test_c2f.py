"""The comparison of fine-tuned and distilled encoders: it runs from audio to table, and goes on where it stopped."""

import json

import pytest
import torch

pytest.importorskip("soundfile", reason="needs the extra train")
pytest.importorskip("sklearn", reason="needs the extra eval")

from atst_fast.models.encoder import ARCHS
from benchmarks import c2f
from tests.train.test_finetune import write_tones


def test_from_audio_to_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ARCHS, "tiny", {"dim": 24, "depth": 2, "num_heads": 3})
    monkeypatch.setattr(c2f, "PRETRAIN", {**c2f.PRETRAIN, "batch_size": 4, "hidden": 32})
    monkeypatch.setattr(c2f, "FINETUNE", {**c2f.FINETUNE, "batch_size": 4})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = tmp_path / "data"
    (data / "pretrain").mkdir(parents=True)
    write_tones(data / "pretrain")
    write_tones(data)
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--steps", "2", "--epochs", "1", "--seeds", "1"]
    c2f.main(options)
    printed = capsys.readouterr().out
    assert "| test scores | clip mAP | clip top-1 | frame mAP | segment F1 (1 s) | event F1 (200 ms) |" in printed
    results = json.loads((tmp_path / "out/c2f.json").read_text())["results"]
    assert list(results) == list(c2f.SYSTEMS)
    assert all(len(values) == 1 for scores in results.values() for values in scores.values())
    (mean,) = results[c2f.SYSTEMS[2]]["clip_map"]
    assert f"| {c2f.SYSTEMS[2]} | {mean:.3f} ± " in printed
    c2f.main(options)
    again = capsys.readouterr()
    assert again.out == printed
    assert again.err.count("complete: ") == 2 + 2 * 3
    torch.set_num_threads(threads)


def test_deviation_of_one_seed_is_zero():
    assert "0.300 ± 0.000 |" in c2f.table({"a": {"clip_map": [0.3]}})
    assert "0.300 ± 0.141 |" in c2f.table({"a": {"clip_map": [0.2, 0.4]}})
