"""``atst-fast``: one subcommand per module; each module is imported when its command runs, and not before."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """``module``'s function ``run`` takes the dataclass ``config`` of ``config_module``; gives an exit code or None."""

    module: str
    run: str
    config_module: str
    config: str
    help: str
    positional: bool = False  # what is required comes by position, not by name


COMMANDS = {
    "pretrain": Command("pretrain", "pretrain", "config", "PretrainConfig", "train ATST-Frame or ATST-Clip on audio"),
    "pack": Command(
        "pack", "pack", "pack", "PackConfig", "turn a folder of audio into PCM shards, for fast training", True
    ),
    "demo-data": Command(
        "demo_data", "demo_data", "demo_data", "DemoDataConfig", "render labelled scenes of instruments"
    ),
    "finetune": Command(
        "finetune", "finetune", "finetune_config", "FinetuneConfig", "train a pretrained encoder on labels"
    ),
    "distill": Command(
        "distill",
        "distill",
        "finetune_config",
        "DistillConfig",
        "ATST-C2F: train an ATST-Frame on an ATST-Clip's answers",
    ),
    "embed": Command(
        "embed", "embed", "embed", "EmbedConfig", "embeddings of a folder of audio, of any length and rate"
    ),
    "probe": Command("probe", "probe", "probe", "ProbeConfig", "measure what a trained encoder has learned"),
    "inspect": Command("inspect", "inspect", "inspect", "InspectConfig", "what a checkpoint holds", True),
    "profile": Command("profile", "profile", "profile", "ProfileConfig", "show where the time of a training step goes"),
    "bench": Command(
        "bench", "bench", "bench", "BenchConfig", "measure the operators beside what one would call otherwise"
    ),
    "info": Command("info", "info", "info", "InfoConfig", "who runs each operator here, and which versions"),
}
EXTRAS = {
    "train": {"tyro", "rich", "soundfile", "soxr", "safetensors", "tensorboard"},
    "train,eval": {"sklearn", "matplotlib"},
    "train,parquet": {"pyarrow"},
    "train,demo": {"pretty_midi", "tinysoundfont"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``atst-fast`` with ``arguments``; returns the exit code: 2 for what only the user can put right."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "--version"):
        print(program_version() if name == "--version" else usage())
        return 0
    if name not in COMMANDS:
        return complain("atst-fast", f"there is no command {name!r}\n{usage()}")
    program = f"atst-fast {name}"
    try:
        return run(COMMANDS[name], program, arguments[1:]) or 0
    except KeyboardInterrupt:
        return complain(program, "interrupted", code=130)
    except ModuleNotFoundError as error:
        extra = next((e for e, modules in EXTRAS.items() if (error.name or "").split(".")[0] in modules), None)
        if extra is None:
            raise
        return complain(program, f"the package {error.name} is missing: pip install 'atst_fast[{extra}]'")
    except BrokenPipeError:
        return 1
    except OSError as error:
        return complain(program, str(error).removeprefix(f"{name}: "))
    except (ValueError, ImportError) as error:
        if not of_user(error, name):
            raise
        return complain(program, str(error).removeprefix(f"{name}: "))


def run(command: Command, program: str, arguments: list[str]) -> int | None:
    import tyro

    config_module = importlib.import_module(f"atst_fast.train.{command.config_module}")
    markers = (tyro.conf.PositionalRequiredArgs,) if command.positional else ()
    config = tyro.cli(
        getattr(config_module, command.config),
        prog=program,
        description=command.help,
        args=arguments,
        config=markers,
    )
    result = getattr(importlib.import_module(f"atst_fast.train.{command.module}"), command.run)(config)
    return result if isinstance(result, int) else None


def of_user(error: Exception, name: str) -> bool:
    """Whether the error is one the user can put right: a UserError, or one that names the command itself."""
    from atst_fast.train.config import UserError

    return isinstance(error, UserError) or str(error).startswith(f"{name}: ")


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: atst-fast COMMAND [options]", "", *lines, "", "atst-fast COMMAND --help lists its options"]
    )


def program_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"atst-fast {version('atst_fast')}"
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "atst-fast, not installed"


def complain(program: str, message: str, code: int = 2) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
