"""What compiled GPU kernels are, read from their machine code: nothing here needs a GPU.

`nvcc_records` compiles a .cu file with the flags of setup.py and returns a `Record` per kernel: ptxas's registers,
stack and spills, and how often each opcode stands in the disassembly (cuobjdump, of the CUDA toolkit or of the triton
package). tests/triton/compile.py makes the same of Triton's kernels. `occupancy` says how many blocks of a kernel a
multiprocessor holds.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_static"
ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Code:
    """Instructions from one address to another, and how many there are of each opcode, NOP left out."""

    begin: int
    end: int
    opcodes: dict[str, int]

    @property
    def length(self) -> int:
        return sum(self.opcodes.values())

    def holds(self, other: "Code") -> bool:
        return self != other and self.begin <= other.begin and other.end <= self.end

    def count(self, pattern: str) -> int:
        """Instructions of an opcode that have these modifiers among theirs: "LDG.128" counts LDG.E.128.CONSTANT.

        "FFMA+FMUL" counts both.
        """
        if "+" in pattern:
            return sum(map(self.count, pattern.split("+")))
        name, *modifiers = pattern.split(".")
        split = ((opcode.split("."), n) for opcode, n in self.opcodes.items())
        return sum(n for (first, *others), n in split if first == name and set(modifiers) <= set(others))


_NOTHING = Code(0, 0, {})


@dataclass(frozen=True)
class Record:
    """One kernel of one architecture. ``shared``: static shared memory in bytes (Triton: all that it asks for).

    ``sections``: the code from one barrier of the block to the next, as it lies in memory.
    """

    name: str
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    code: Code = _NOTHING
    loops: tuple[Code, ...] = ()
    sections: tuple[Code, ...] = ()

    def count(self, pattern: str) -> int:
        return self.code.count(pattern)


@dataclass(frozen=True)
class Gpu:
    """Limits of one multiprocessor (CUDA C++ programming guide, "Technical Specifications per Compute Capability")."""

    shared: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


GPUS = {80: Gpu(shared=164 << 10), 90: Gpu(shared=228 << 10), 100: Gpu(shared=228 << 10)}


def occupancy(registers: int, threads: int, shared: int, arch: int) -> int:
    """Blocks that one multiprocessor holds at a time; ``shared`` is a block's, static and dynamic."""
    gpu = GPUS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are given to a warp in units of 256
    by_registers = gpu.registers // per_warp // 4 * 4 // warps  # and a quarter of them belongs to each scheduler
    by_shared = gpu.shared // (-(-shared // 128) * 128 + 1024)  # the system keeps 1 KB per block
    return min(gpu.blocks, gpu.warps // warps, by_registers, by_shared)


@cache
def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


@cache
def triton_tool(name: str) -> str | None:
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    return shutil.which(name, path=str(folder)) if folder else None


@cache
def cuobjdump() -> str | None:
    return triton_tool("cuobjdump") or shutil.which("cuobjdump")


def missing() -> str | None:
    """What this machine lacks for compiling and disassembling CUDA, in words."""
    if nvcc() is None:
        return "needs nvcc (CUDA_HOME or PATH)"
    return None if cuobjdump() else "needs cuobjdump (CUDA toolkit, or the package triton)"


@cache
def known_archs() -> tuple[int, ...]:
    """Those of ARCHS that nvcc compiles for."""
    codes = run(nvcc(), "--list-gpu-code").split()
    return tuple(arch for arch in ARCHS if f"sm_{arch}" in codes)


@cache
def nvcc_version() -> str:
    return run(nvcc(), "--version")


@cache
def flags() -> tuple[str, ...]:
    """nvcc's flags as setup.py gives them to the build."""
    spec = importlib.util.spec_from_file_location("atst_fast_setup", ROOT / "setup.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.nvcc_flags())


def nvcc_records(source: Path, arch: int, folder: Path = CACHE) -> list[Record]:
    """The kernels of a .cu file; computed once for these sources, headers, flags and nvcc."""
    path = folder / f"{source.stem}-sm_{arch}-{_fingerprint(source)}.json"
    try:
        return [record_of(entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError):  # not there, or cut off
        pass
    folder.mkdir(parents=True, exist_ok=True)
    records = _compile(source, arch)
    for old in folder.glob(f"{source.stem}-sm_{arch}-*.json"):
        old.unlink(missing_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps([asdict(r) for r in records]))
    os.replace(temporary, path)
    return records


def record_of(entry: dict) -> Record:
    code = Code(**entry.pop("code"))
    loops, sections = (tuple(Code(**part) for part in entry.pop(name)) for name in ("loops", "sections"))
    return Record(**entry, code=code, loops=loops, sections=sections)


def _fingerprint(source: Path) -> str:
    digest = hashlib.sha256()
    headers = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])
    for path in [source, *headers, Path(__file__)]:
        digest.update(path.read_bytes())
    digest.update("\n".join([*flags(), nvcc_version(), cuobjdump() or ""]).encode())
    return digest.hexdigest()[:16]


def _compile(source: Path, arch: int) -> list[Record]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc(), *flags(), f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
        return records(arch, done.stderr, run(cuobjdump(), "-sass", str(cubin)))


def records(arch: int, ptxas: str, sass: str) -> list[Record]:
    """The kernels in what ``ptxas -v`` and ``cuobjdump -sass`` print."""
    code = parse_sass(sass)
    usage = parse_ptxas(ptxas)
    return [Record(name, arch, **usage[m], **code[m]) for m, name in zip(usage, demangle(list(usage)))]


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Per mangled kernel name: registers, stack, spill_stores, spill_loads, shared."""
    usage: dict[str, dict[str, int]] = {}
    for block in re.split(r"ptxas\S* info\s*: Compiling entry function ", text)[1:]:
        numbers = {"registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack frame"}
        numbers |= {"spill_stores": r"(\d+) bytes spill stores", "spill_loads": r"(\d+) bytes spill loads"}
        found = {key: re.search(pattern, block) for key, pattern in numbers.items()}
        if lacking := [key for key, match in found.items() if not match]:
            raise ValueError(f"ptxas -v says nothing of {lacking}: {block}")
        shared = re.search(r"(\d+) bytes smem", block)
        name = re.match(r"'(.*?)'", block)
        assert name
        usage[name.group(1)] = {key: int(m.group(1)) for key, m in found.items() if m}
        usage[name.group(1)]["shared"] = int(shared.group(1)) if shared else 0
    return usage


def parse_sass(text: str) -> dict[str, dict]:
    """Per mangled kernel name: its code, its loops (what a branch jumps back over; inner ones too) and sections."""
    kernels: dict[str, dict] = {}
    for block in re.split(r"Function : ", text)[1:]:
        name, _, body = block.partition("\n")
        found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", body, re.MULTILINE)
        lines = [(int(address, 16), opcode, operands) for address, opcode, operands in found]
        code = _code(lines, 0, lines[-1][0] if lines else 0)
        loops = []
        for address, opcode, operands in lines:
            target = re.search(r"\b0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
            if target and int(target.group(1), 16) < address:
                loops.append(_code(lines, int(target.group(1), 16), address))
        barriers = [address for address, opcode, _ in lines if opcode.startswith("BAR.SYNC")]
        bounds = [-1, *barriers, code.end + 1]
        sections = tuple(_code(lines, begin + 1, end - 1) for begin, end in pairwise(bounds))
        kernels[name.strip()] = {"code": code, "loops": tuple(loops), "sections": sections}
    return kernels


def _code(lines: list[tuple[int, str, str]], begin: int, end: int) -> Code:
    inside = Counter(opcode for address, opcode, _ in lines if begin <= address <= end and opcode != "NOP")
    return Code(begin, end, dict(inside))


def demangle(names: list[str]) -> list[str]:
    """``name<template arguments>`` of each kernel, without namespaces."""
    if not names:
        return []
    plain = run("c++filt", *names).splitlines()
    return [_short(name) for name in plain]


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):  # the parameter list starts at the first parenthesis outside of <>
        depth += (c == "<") - (c == ">")
        if c == "(" and not depth:
            name = name[:i]
            break
    plain, bracket, arguments = name.partition("<")
    return plain.rpartition("::")[2] + bracket + arguments


def run(*command: str | None) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
