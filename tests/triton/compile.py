"""Compile what the Triton launchers launch, for GPUs that are not here: ``python -m tests.triton.compile MODULE ARCH``.

A process of its own, because in the tests' process Triton interprets. Prints JSON: for each launch its kernels as
tests/cuda/static.py describes them. Computed once for these sources and this triton.
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cuda import static

CACHE = static.ROOT / "build" / "triton_static"


class Driver:
    """A GPU of an architecture, as far as the compiler asks."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device=None):
        return 0

    def map_python_to_cpp_type(self, ty):
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)


def kernels_of(call, arch):
    """What ``call`` would launch on that architecture, compiled."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(Driver(arch))
    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return compiled


def record(name, compiled, arch):
    """The machine code of a compiled kernel, and its threads per block."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (code,) = (found["code"] for found in static.parse_sass(_dump(cubin, "-sass")).values())
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", _dump(cubin, "-res-usage")).groups()
    spills = {"stack": int(stack), "spill_stores": code.count("STL"), "spill_loads": code.count("LDL")}
    read = static.Record(name, arch, int(registers), **spills, shared=compiled.metadata.shared, code=code)
    return dataclasses.asdict(read) | {"threads": 32 * compiled.metadata.num_warps}


def _dump(cubin, what):
    return static.run(static.cuobjdump(), what, str(cubin))


def wanted(module, arch, candidates):
    """The launches of a module for an architecture: those that are made, or what else `benchmarks.gpu.tune` tries."""
    found = importlib.import_module(f"tests.triton.launches.{module}").launches()
    assert len({launch.name for launch in found}) == len(found), f"{module}: two launches of one name"
    return {launch.name: launch for launch in found if arch in launch.archs and launch.candidate == candidates}


def compile_module(module, arch, candidates):
    return {
        name: [record(kernel, compiled, arch) for kernel, compiled in kernels_of(launch.call, arch)]
        for name, launch in wanted(module, arch, candidates).items()
    }


def compiled(module, arch, candidates=False):
    """Per launch of a module, the records of its kernels and their threads, from the cache or a new process."""
    path = CACHE / f"{module}{'-candidates' * candidates}-sm_{arch}-{_fingerprint(module)}.json"
    if not path.exists():
        command = [sys.executable, "-m", "tests.triton.compile", module, str(arch), str(path)]
        command += ["--candidates"] * candidates
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(CACHE / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=static.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling the launches of {module} for sm_{arch} failed:\n{done.stderr[-4000:]}")
    entries = json.loads(path.read_text())
    return {name: list(map(_read, kernels)) for name, kernels in entries.items()}


def _read(entry):
    threads = entry.pop("threads")
    return static.record_of(entry), threads


def _fingerprint(module):
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    harness = [Path(__file__), Path(static.__file__), Path(__file__).parent / "launches" / "__init__.py"]
    launches = Path(__file__).parent / "launches" / f"{module}.py"
    for path in [*sorted((static.ROOT / "kernels").glob("*.py")), launches, *harness]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module")
    parser.add_argument("arch", type=int)
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--candidates", action="store_true", help="configurations that are not in use")
    arguments = parser.parse_args()
    done = compile_module(arguments.module, arguments.arch, arguments.candidates)
    if arguments.path is None:
        for name, kernels in done.items():
            for kernel in kernels:
                summary = {k: kernel[k] for k in ("name", "registers", "spill_stores", "stack", "shared", "threads")}
                print(name, summary)
        return
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    for old in arguments.path.parent.glob(f"{arguments.path.name.rpartition('-')[0]}-*.json"):
        old.unlink(missing_ok=True)
    temporary = arguments.path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(done))
    os.replace(temporary, arguments.path)


if __name__ == "__main__":
    main()
