"""Builds atst_fast._C with ninja: C++ on libtorch's stable ABI, the *_simd.cpp files once per instruction set, and,
where torch has CUDA and nvcc is found, the *_cuda.cu files for the GPUs that TORCH_CUDA_ARCH_LIST names.

Everything else about the package is in pyproject.toml.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

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
# -lineinfo changes no code: compute-sanitizer and profilers name lines by it
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# Machine code for A100, H100 and H200, B200, as far as nvcc knows them; newer GPUs compile the PTX of the last.
CUDA_ARCHS = ("8.0", "9.0", "10.0")


def tool(name):
    """The compiler that this Python was built for, unless CXX says otherwise."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var(name) or "g++")[0]


class NinjaBuild(build_ext):
    """One build.ninja for the extension: an object per source (and instruction set).

    CXXFLAGS, NVCCFLAGS and LDFLAGS add to the flags.
    """

    def build_extension(self, ext):
        import ninja
        from ninja.ninja_syntax import Writer

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(build / "build.ninja", "w") as f:
            write_rules(Writer(f, width=1000), build, target, [ROOT / s for s in ext.sources], Cuda.find())
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), *jobs], check=True)


def write_rules(n, build, target, sources, cuda):
    cxx = tool("CXX")
    compile_flags = shlex.join(compiler_flags(cxx, cuda))
    n.rule(
        "cxx",
        f"{cxx} -MMD -MF $out.d {compile_flags} $flags -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="CXX $out",
    )
    if cuda.nvcc:
        threads = min(len(cuda.gencode), os.cpu_count() or 1)
        flags = shlex.join([f"-ccbin={cxx}", f"--threads={threads}", *nvcc_flags(), *cuda.gencode])
        command = f"{shlex.quote(cuda.nvcc)} -MD -MF $out.d {flags} -c $in -o $out"
        n.rule("nvcc", command, depfile="$out.d", deps="gcc", description="NVCC $out")
    n.rule("link", f"{cxx} -shared $in -o $out {shlex.join(linker_flags(cuda))}", description="LINK $out")
    objects = []
    for source in sources:
        stem = "_".join(source.relative_to(CSRC).with_suffix("").parts)
        if source.suffix == ".cu":
            if cuda.nvcc:
                objects += n.build(str(build / f"{stem}.o"), "nvcc", str(source))
            continue
        for isa, march in (ISAS if source.stem.endswith("_simd") else {"": []}).items():
            out = str(build / (f"{stem}.{isa}.o" if isa else f"{stem}.o"))
            extra = [*SIMD_FLAGS, f"-DATST_ISA={isa}", *march] if isa else []
            objects += n.build(out, "cxx", str(source), variables={"flags": shlex.join(extra)})
    n.build(str(target), "link", objects)


class Cuda(NamedTuple):
    """The nvcc to build with and its -gencode flags; or neither, and what build_info() says about it."""

    nvcc: str | None
    gencode: list[str]
    says: str

    @classmethod
    def find(cls):
        import torch

        if not torch.version.cuda:
            return cls(None, [], "none: torch had no CUDA when this was built")
        home = os.environ.get("CUDA_HOME")
        nvcc = (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")
        if nvcc is None:
            return cls(None, [], "none: nvcc was not found when this was built")
        said = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
        if said is None:
            return cls(None, [], f"none: {nvcc} did not say of which CUDA it is when this was built")
        release = said.group(1)
        if release != torch.version.cuda.split(".")[0]:  # the runtime that is linked would want another driver
            why = f"nvcc was of CUDA {release} when this was built, torch of CUDA {torch.version.cuda}"
            return cls(None, [], f"none: {why}")
        gencode = arch_flags(nvcc)
        return cls(nvcc, gencode, ", ".join(re.sub("compute_", "PTX of sm_", f.rpartition("=")[2]) for f in gencode))


def arch_flags(nvcc):
    """-gencode flags of TORCH_CUDA_ARCH_LIST, which is read as torch reads it."""
    from torch.utils import cpp_extension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = output(nvcc, "--list-gpu-code").split()
        archs = [arch for arch in CUDA_ARCHS if f"sm_{arch.replace('.', '')}" in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    flags = cpp_extension._get_cuda_arch_flags()
    return sorted(flags, key=lambda f: ("code=compute" in f, int(re.search(r"compute_(\d+)", f).group(1))))


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def includes():
    from torch.utils import cpp_extension

    return [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]


def compiler_flags(cxx, cuda):
    import pybind11
    import torch

    defines = {
        "TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
        "ATST_COMPILER": f'"{output(cxx, "--version").splitlines()[0]}"',
        "ATST_TORCH_VERSION": f'"{torch.__version__}"',
        "ATST_CUDA": f'"{cuda.says}"',
    }
    flags = [*CXX_FLAGS, f"-I{CSRC}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    python = [f"-isystem{i}" for i in (pybind11.get_include(), sysconfig.get_path("include"))]
    return [*flags, *(f"-D{k}={v}" for k, v in defines.items()), *python, *includes()]


def nvcc_flags():
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    return [*NVCC_FLAGS, *defines, f"-I{CSRC}", *includes(), *shlex.split(os.environ.get("NVCCFLAGS", ""))]


def linker_flags(cuda):
    from torch.utils import cpp_extension

    libraries = [*(f"-L{p}" for p in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]
    if cuda.nvcc:
        # CUDA's runtime is linked statically, so that nothing of nvcc's toolkit is needed later; its symbols are
        # hidden, for torch's own runtime is loaded before and would take their place.
        command = [cuda.nvcc, "--dryrun", "-x", "cu", os.devnull]
        dry = subprocess.run(command, capture_output=True, text=True, check=True)
        folders = shlex.split(re.search(r"LIBRARIES=(.*)", dry.stderr).group(1))
        runtime = ["-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
        libraries += ["-ltorch_cuda", *folders, *runtime]
    return [*libraries, *shlex.split(os.environ.get("LDFLAGS", ""))]


def sources():
    patterns = ("*.cpp", "*/*_cpu.cpp", "*/*_simd.cpp", "*/*_cuda.cu")
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern))


if __name__ == "__main__":
    setup(ext_modules=[Extension("atst_fast._C", sources())], cmdclass={"build_ext": NinjaBuild})
