"""Builds atst_fast._C with ninja: C++ on libtorch's stable ABI, the *_simd.cpp files once per instruction set.

Everything else about the package is in pyproject.toml.
"""

import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# Instruction sets of the CPU kernels, chosen between at run time (csrc/dispatch.cpp).
ISAS = {"portable": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"portable": []}

# libtorch 2.10: the oldest stable ABI that has std::vector<Tensor> arguments and parallel_for.
TORCH_TARGET_VERSION = "0x020a000000000000"
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
SIMD_FLAGS = ["-Wno-psabi", "-ffp-contract=fast"]


def tool(name):
    """The compiler that this Python was built for, unless CXX says otherwise."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var(name) or "g++")[0]


class NinjaBuild(build_ext):
    """One build.ninja for the extension: an object per source (and instruction set). CXXFLAGS and LDFLAGS add."""

    def build_extension(self, ext):
        import ninja
        from ninja.ninja_syntax import Writer

        cxx = tool("CXX")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(build / "build.ninja", "w") as f:
            n = Writer(f, width=1000)
            compile_flags = shlex.join(compiler_flags(cxx))
            n.rule(
                "cxx",
                f"{cxx} -MMD -MF $out.d {compile_flags} $flags -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="CXX $out",
            )
            n.rule("link", f"{cxx} -shared $in -o $out {shlex.join(linker_flags())}", description="LINK $out")
            objects = []
            for source in (ROOT / s for s in ext.sources):
                stem = "_".join(source.relative_to(CSRC).with_suffix("").parts)
                variants = ISAS if source.stem.endswith("_simd") else {"": []}
                for isa, march in variants.items():
                    out = str(build / (f"{stem}.{isa}.o" if isa else f"{stem}.o"))
                    extra = [*SIMD_FLAGS, f"-DATST_ISA={isa}", *march] if isa else []
                    n.build(out, "cxx", str(source), variables={"flags": shlex.join(extra)})
                    objects.append(out)
            n.build(str(target), "link", objects)
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), *jobs], check=True)


def compiler_flags(cxx):
    import pybind11
    import torch
    from torch.utils import cpp_extension

    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    defines = {
        "TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
        "ATST_COMPILER": f'"{version}"',
        "ATST_TORCH_VERSION": f'"{torch.__version__}"',
    }
    includes = [pybind11.get_include(), sysconfig.get_path("include"), *cpp_extension.include_paths()]
    flags = [*CXX_FLAGS, f"-I{CSRC}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    return [*flags, *(f"-D{k}={v}" for k, v in defines.items()), *(f"-isystem{i}" for i in includes)]


def linker_flags():
    from torch.utils import cpp_extension

    libraries = [*(f"-L{p}" for p in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]
    return [*libraries, *shlex.split(os.environ.get("LDFLAGS", ""))]


def sources():
    patterns = ("*.cpp", "*/*_cpu.cpp", "*/*_simd.cpp")
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern))


if __name__ == "__main__":
    setup(ext_modules=[Extension("atst_fast._C", sources())], cmdclass={"build_ext": NinjaBuild})
