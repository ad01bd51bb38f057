"""The CUDA kernels as C++ on the CPU: torch.ops.atst_fast_shim, built from the same files as the CUDA build.

`load()` builds (build/cuda_shim, only what changed) and loads it; `load_module()` does so for kernels of a test.
"""

import contextlib
import ctypes
import fcntl
import functools
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

import setup

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_shim"
NO_CUDA = setup.Cuda(None, [], "none: the shim is C++")

# The sanitizers' calls without their libraries: the runtime answers them. They are put in before loops are vectorized
# and stores merged, so that what they see are the accesses of the source; loads that it does not make stay out.
CHECKED = [
    "-O2",
    "-fno-hoist-adjacent-loads",
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow",
    "--param=tsan-instrument-func-entry-exit=0",
    "--param=tsan-distinguish-volatile=1",
    "-ffp-contract=fast",  # as on the GPU
    "-ftrivial-auto-var-init=pattern",  # a local that nobody set is the same wrong number every time
]
WRAPPED = [f"-Wl,--wrap={name}" for name in ("memcpy", "memmove", "memset")]  # kernels' calls of them are seen, too


def unavailable():
    """Why the shim cannot be built here, or None."""
    cxx = setup.tool("CXX")
    if shutil.which(cxx) is None:
        return f"the shim needs gcc, and there is no {cxx}"
    macros = subprocess.run([cxx, "-dM", "-E", "-x", "c++", "-"], input="", capture_output=True, text=True).stdout
    if "__GNUC__" not in macros or "__clang__" in macros:
        return f"the shim needs gcc, and the compiler is {cxx}"
    return None


@functools.cache
def _flags():
    cxx = setup.tool("CXX")
    fma = Path("/proc/cpuinfo").exists() and {"fma", "avx2"} <= set(Path("/proc/cpuinfo").read_text().split())
    return [*setup.compiler_flags(cxx, NO_CUDA), "-g1", f"-I{HERE}", *(["-mfma", "-mavx2"] if fma else [])]


def _ninja(name, sources, flags, link_flags, libraries):
    """Builds build/cuda_shim/lib<name>.so from sources, as setup.py builds the extension."""
    import ninja
    from ninja.ninja_syntax import Writer

    cxx = setup.tool("CXX")
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    target = BUILD / f"lib{name}.so"
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "build.ninja", "w") as f:
            n = Writer(f, width=1000)
            command = f"{cxx} -MMD -MF $out.d {shlex.join(flags)} -c -x c++ $in -o $out"
            n.rule("cxx", command, depfile="$out.d", deps="gcc")
            link = shlex.join([f"-Wl,-soname,lib{name}.so", f"-Wl,-rpath,{BUILD}", *link_flags, *map(str, libraries)])
            n.rule("link", f"{cxx} -shared $in -o $out {link} {shlex.join(setup.linker_flags(NO_CUDA))}")
            objects = []
            for source in map(Path, sources):
                objects.append(str(folder / f"{source.stem}.o"))
                n.build(objects[-1], "cxx", str(source.resolve()))
            n.build(str(target), "link", objects, implicit=list(map(str, libraries)))
        run = subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the CUDA shim could not be built:\n{run.stdout[-8000:]}{run.stderr[-2000:]}")
    return target


def _build_runtime():
    return _ninja("cuda_shim_runtime", sorted(HERE.glob("*.cpp")), _flags(), [], [])


def build_module(name, sources, defines=()):
    """A library of kernels and their operators, checked by the runtime."""
    flags = [*_flags(), *CHECKED, *(f"-D{d}" for d in defines)]
    return _ninja(name, sources, flags, WRAPPED, [_build_runtime()])


def build():
    csrc = ROOT / "csrc"
    sources = [csrc / "library.cpp", *sorted(csrc.glob("*/*_cuda.cu"))]
    return build_module("atst_fast_shim", sources, ["ATST_LIBRARY=atst_fast_shim"])


@functools.cache
def _load_once(build, *arguments):
    """Loads what build() returns; or the error, so that a test session compiles only once what does not compile."""
    try:
        torch.ops.load_library(build(*arguments))
    except RuntimeError as error:
        return error
    return None


def load_module(name, *sources):
    """torch.ops.<name> of a module that a test defines with STABLE_TORCH_LIBRARY(<name>, m)."""
    if error := _load_once(build_module, name, sources):
        raise error
    return getattr(torch.ops, name)


def load():
    if error := _load_once(build):
        raise error
    return torch.ops.atst_fast_shim


@functools.cache
def runtime():
    return ctypes.CDLL(str(_build_runtime()))


def schedule(order="forward", seed=0):
    """The order in which blocks, warps and lanes run from now on: forward, reverse or shuffled."""
    runtime().shim_schedule(["forward", "reverse", "shuffled"].index(order), ctypes.c_ulonglong(seed))


def latest_launch():
    """Kernel, threads of a block and bytes of dynamic shared memory of the latest launch."""
    said = runtime().shim_latest_launch
    said.restype = ctypes.c_char_p
    name, threads, shared = said().decode().rsplit(" ", 2)
    return name, int(threads), int(shared)


@contextlib.contextmanager
def nothing_left():
    """Forward order again afterwards; an operator must have ended and its errors must have been raised."""
    schedule()
    try:
        yield
    finally:
        schedule()
    assert runtime().shim_left_over() == 0
