import subprocess
import sys

import pytest

from atst_fast.train import cli


def run(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "atst_fast.train.cli", *map(str, arguments)], capture_output=True, text=True, **kwargs
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command_without_importing_torch(arguments):
    done = run(*arguments)
    assert done.returncode == 0
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert command.help in done.stdout
    code = "import sys; from atst_fast.train import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["pretrain", "pack", "embed", "info"])
def test_options_have_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"atst-fast {name}" in shown
    assert cli.COMMANDS[name].help in " ".join(shown.split())


def test_errors_of_the_user_are_one_line_and_code_2(tmp_path, clips_folder, capsys):
    cases = [
        (["trian"], "atst-fast: there is no command 'trian'"),
        (["pretrain", "--data", f"{tmp_path}/no", "--out", f"{tmp_path}/o"], "atst-fast pretrain: there is no folder"),
        (
            ["pretrain", "--data", str(clips_folder), "--out", f"{tmp_path}/o", "--batch-size", "0"],
            "atst-fast pretrain: --batch-size must be at least 1, got 0",
        ),
        (["pack", str(tmp_path / "no"), str(tmp_path / "p")], "atst-fast pack: there is no folder"),
    ]
    for arguments, message in cases:
        assert cli.main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith(message)
        assert "Traceback" not in told
    with pytest.raises(SystemExit) as stop:  # tyro's own message
        cli.main(["pretrain", "--arch", "huge"])
    assert stop.value.code == 2


def test_a_real_process_ends_with_the_code(tmp_path):
    done = run("pack", tmp_path / "no", tmp_path / "p")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def fake(monkeypatch, error):
    def run(*_):
        raise error

    monkeypatch.setattr(cli, "run", run)


def test_missing_packages_are_named_with_their_extra(monkeypatch, capsys):
    for package, extra in (
        ("soundfile", "train"),
        ("pyarrow", "train,parquet"),
        ("sklearn", "train,eval"),
        ("tinysoundfont", "train,demo"),
    ):
        fake(monkeypatch, ModuleNotFoundError(f"No module named {package!r}", name=package))
        assert cli.main(["probe"]) == 2
        assert capsys.readouterr().err == (
            f"atst-fast probe: the package {package} is missing: pip install 'atst_fast[{extra}]'\n"
        )
    fake(monkeypatch, ModuleNotFoundError("No module named 'nonsense'", name="nonsense"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["probe"])


def test_tyro_missing_is_named_too(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["info"]) == 2
    assert "the package tyro is missing: pip install 'atst_fast[train]'" in capsys.readouterr().err


def test_whose_error_it_is(monkeypatch, capsys):
    for error, message in (
        (FileNotFoundError(2, "No such file", "x.wav"), "[Errno 2] No such file: 'x.wav'"),
        (ValueError("demo-data: minutes must be 1"), "minutes must be 1"),
        (FileExistsError("demo-data: out must be new"), "out must be new"),
        (ImportError("demo-data: the package p is missing"), "the package p is missing"),
    ):
        fake(monkeypatch, error)
        assert cli.main(["demo-data"]) == 2
        assert capsys.readouterr().err == f"atst-fast demo-data: {message}\n"
    for error in (ValueError("shapes differ"), ImportError("broken"), RuntimeError("bug")):
        fake(monkeypatch, error)
        with pytest.raises(type(error)):
            cli.main(["demo-data"])
    fake(monkeypatch, KeyboardInterrupt())
    assert cli.main(["demo-data"]) == 130


def test_info_prints_build_and_versions(capsys):
    import torch

    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("operators", "ema", "isa", "torch", torch.__version__, "soundfile"):
        assert word in shown
