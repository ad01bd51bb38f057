"""Triton's interpreter as the tests use it: every access checked, and what it gets wrong put right.

`enable` must come before anything imports triton: decorators choose then between interpreter and compiler. What is put
right, in triton 3.4 to 3.9: conversions to bfloat16 (truncated), matrix products of bfloat16 (taken of their bits), and
loop bounds that numpy 2.4 no longer takes for integers.
"""

import contextlib
import os
import warnings

import numpy as np
import torch

_KNOWN: list[tuple[int, int, str]] = []  # memory of the running launch: first byte, end, name


def enable():
    os.environ["TRITON_INTERPRET"] = "1"


def enabled():
    return os.environ.get("TRITON_INTERPRET") == "1"


def install():
    """Put the interpreter right, once; imports triton."""
    from triton.runtime import interpreter

    if getattr(interpreter, "_checked_by_atst", False):
        return
    interpreter._checked_by_atst = True
    _fix_loops(interpreter)
    _fix_bfloat16(interpreter)
    _reduce_slices(interpreter)
    _check_accesses(interpreter)


def _fix_loops(interpreter):
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        index = lambda self: int(self.handle.data.item())  # noqa: E731
        scope[0].set_attr(tensor, "__index__", index) if scope else setattr(tensor, "__index__", index)

    interpreter._patch_lang_tensor = patched


def _fix_bfloat16(interpreter):
    import triton.language as tl

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def converted(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return _widen(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return _narrow(data)
        return convert(data, source, target, rounding)

    def product(self, a, b, d, *rest):
        a, b = (
            interpreter.TensorHandle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, d, *rest)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = product


def _reduce_slices(interpreter):
    """tl.reduce with a function of the kernel's own: all rows at once, in the order of its loop over single values."""
    one_by_one = interpreter.ReduceOps.generic_reduce

    def reduce(self, input):
        if self.axis is None or input[0].handle.data.ndim < 2:
            return one_by_one(self, input)
        slices = [np.moveaxis(x.handle.data, self.axis, 0) for x in input]
        total = None
        for values in zip(*slices):
            values = tuple(self.to_tensor(v, x.dtype) for v, x in zip(values, input))
            total = values if total is None else self.combine_fn.fn(*total, *values)
            total = total if isinstance(total, tuple) else (total,)
        found = (np.expand_dims(t.handle.data, self.axis) if self.keep_dims else t.handle.data for t in total)
        return [self.to_tensor(t, x.dtype) for t, x in zip(found, input)]

    interpreter.ReduceOps.generic_reduce = reduce


def _widen(bits):
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def _narrow(values):
    """Rounded to the nearest, ties to even; as bits."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy().reshape(values.shape)


def _check_accesses(interpreter):
    """Every address that a kernel reads or writes lies in a tensor that its launch was given."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    begin = interpreter.GridExecutor._init_args_hst

    def known(executor, args, kwargs):
        _KNOWN[:] = [_extent(x, name) for name, x in [*zip(executor.arg_names, args), *kwargs.items()] if _is_tensor(x)]
        return begin(executor, args, kwargs)

    def checked_load(self, ptrs, mask, other, *rest):
        _check("reads", ptrs, mask)
        if other is None:  # what a masked load leaves undefined is zero nowhere but here
            element = ptrs.get_element_ty()
            undefined = np.empty(ptrs.data.shape, interpreter._get_np_dtype(element))
            undefined.view(np.uint8).fill(0x5A)
            if element.is_floating():
                undefined.fill(0x7FC0 if undefined.dtype == np.uint16 else np.nan)
            other = interpreter.TensorHandle(undefined, element)
        return load(self, ptrs, _as_bool(mask), other, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        _check("writes", ptrs, mask)
        return store(self, ptrs, value, _as_bool(mask), *rest)

    def _as_bool(mask):
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    interpreter.GridExecutor._init_args_hst = known
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


def _extent(x, name):
    size = 1 + sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + size * x.element_size(), name


def _check(verb, ptrs, mask):
    addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
    size = ptrs.get_element_ty().primitive_bitwidth // 8
    inside = np.zeros(addresses.shape, bool)
    for first, end, _ in _KNOWN:
        inside |= (addresses >= first) & (addresses + size <= end)
    if not inside.all():
        wrong = int(addresses[~inside].min())
        distances = [(min(abs(wrong - first), abs(wrong - end)), name, wrong - end) for first, end, name in _KNOWN]
        _, name, beyond = min(distances)
        where = f"the first {beyond} bytes from the end of {name}"
        raise IndexError(f"{verb} {(~inside).sum()} elements out of bounds, {where}")


@contextlib.contextmanager
def on_cpu():
    """The Triton kernels run the operators on the CPU, interpreted, in the place of what the CPU has."""
    from atst_fast.ops import _registry

    install()
    library = torch.library.Library("atst_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for op in _registry.triton_operators():
            library.impl(op, _registry.triton_kernel(op), "CPU", allow_override=True)
    _registry.HALVES.add("cpu")
    try:
        yield
    finally:
        _registry.HALVES.discard("cpu")
        library._destroy()


@contextlib.contextmanager
def poison():
    """What is allocated without a value holds NaN, so that what a kernel leaves unwritten shows."""
    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    places += [(torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided")]
    before = [getattr(owner, name) for owner, name in places]

    def poisoned(allocate):
        def call(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return call

    for (owner, name), allocate in zip(places, before):
        setattr(owner, name, poisoned(allocate))
    try:
        yield
    finally:
        for (owner, name), allocate in zip(places, before):
            setattr(owner, name, allocate)
