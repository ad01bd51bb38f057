"""``python -m benchmarks.card``: the GPUs of this machine as TORCH_CUDA_ARCH_LIST wants them, or why there are none."""

import sys


def archs() -> str:
    """``9.0``, or ``8.0;9.0`` where they differ. RuntimeError says what is missing."""
    try:
        import torch
    except ImportError:
        raise RuntimeError(f"{sys.executable} without torch (GPU_PYTHON names another Python)") from None
    if not torch.version.cuda:
        raise RuntimeError(f"torch {torch.__version__}, which is built without CUDA")
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__}, and no GPU that it can use")
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


if __name__ == "__main__":
    try:
        print(archs())
    except RuntimeError as error:
        sys.exit(f"make gpu needs an NVIDIA GPU and a torch with CUDA; found {error}")
