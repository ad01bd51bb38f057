"""Triton kernels of atst_fast; import them as ``atst_fast.kernels``.

setuptools' package-dir maps this folder there (pyproject.toml).
"""

if __name__ != "atst_fast.kernels":
    raise ImportError(f"import atst_fast.kernels, not {__name__!r}: this folder is part of the package atst_fast")
