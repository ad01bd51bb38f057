"""What is compiled for GPUs that are not here: for each kernel module, launches as the operators make them.

A file <module>.py has ``launches()``, a list of `Launch`. tests/triton/compile.py calls each with a driver that
compiles instead of launching.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

# the tensor cores' instructions: of Hopper's and Blackwell's own kind, or the older one that every GPU still has
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
OLD_TENSOR_CORES = {80: "HMMA", 90: "HMMA", 100: "HMMA"}
SOME, NONE = (1, None), (0, 0)


@dataclass(frozen=True)
class Launch:
    """``call`` runs a launcher on CPU tensors of the sizes that matter; ``name`` says which kernel and what of it.

    Of every kernel that it launches, for each architecture: ``products``, the opcode of its matrix products, if it has
    any; ``opcodes``, how many instructions of a kind there must be (least, most; see tests/cuda/static.py);
    ``registers`` at most; ``archs`` that it is for, 86 among them where it must do with 99 KB of shared
    memory (compiled as 80, which it computes like). ``only``: hold only the kernel of that name to ``products`` and
    ``opcodes``. No kernel may spill, whatever it says here. ``candidate``: a configuration that no launch is made with
    but `benchmarks.gpu.tune` tries; they take long to compile, so that `make test-all` alone does it.
    """

    name: str
    call: Callable[[], object]
    products: dict[int, str] | None = None
    opcodes: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    registers: int = 255
    archs: tuple[int, ...] = (80, 86, 90, 100)
    only: str | None = None
    candidate: bool = False
