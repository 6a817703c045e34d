"""Triton kernels beside the operators they serve, in modules that import without Triton.

`kernel` marks a function as a Triton kernel (or a device function of one). Triton is imported, and the name
`tl` bound in the kernel's module, when one is first launched; until then the function is only text.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Compiled(NamedTuple):
    """A kernel as one launch would have run it.

    Attributes:
        name: of the kernel's function, without leading underscores. grid: of the launch.
        binary: Triton's compiled kernel: `asm` by kind of code, and `metadata`.
    """

    name: str
    grid: tuple[int, ...]
    binary: Any


_compiled: list[Compiled] | None = None  # where launches go while `compile_only` lasts


class Kernel:
    """A Triton kernel that is not one yet: `kernel[grid](...)` launches it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    @functools.cached_property
    def jit(self) -> Any:
        """The function as Triton's own; with it the device functions it calls."""
        import triton
        import triton.language as tl

        scope = self.function.__globals__
        scope["tl"] = tl
        for name in self.function.__code__.co_names:
            if isinstance(scope.get(name), Kernel):
                scope[name] = scope[name].jit
        return triton.jit(self.function)

    def __call__(self, *args: Any) -> Any:
        raise TypeError(f"{self.function.__name__} runs inside kernels, or as {self.function.__name__}[grid]")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            if 0 in grid:
                return
            if _compiled is not None:
                binary = self.jit.warmup(*args, grid=grid, **options)
                _compiled.append(Compiled(self.function.__name__.strip("_"), grid, binary))
                return
            first = next(x for x in args if isinstance(x, Tensor))
            if first.is_cuda:  # Triton launches on the current device, which need not be the tensor's
                with torch.cuda.device(first.device):
                    self.jit[grid](*args, **options)
            else:
                self.jit[grid](*args, **options)

        return launch


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a Triton kernel, or a device function that kernels call."""
    return Kernel(function)


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel takes these tensors on any device, or None; integer dtypes are no reason."""
    for dtype in (x.dtype for x in tensors if x is not None and x.is_floating_point()):
        if dtype not in DTYPES:
            return (
                f"dtype {str(dtype).removeprefix('torch.')}: the kernels take float32, bfloat16 and float16"
            )
    return None


def refusal(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel takes these tensors where they are, or None where one does."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        return f"tensors on {len(devices)} devices: {', '.join(sorted(map(str, devices)))}"
    (device,) = devices
    if device.type != "cuda":  # torch calls AMD's devices cuda as well
        return f"Triton has no kernels for {device.type}"
    return unsupported(*tensors) or (None if _has_triton() else "triton is not installed")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def dot_precision(dtype: torch.dtype) -> str:
    """How kernels multiply float32 matrices: for results of half precision as sums of products of bfloat16
    parts, 16 bits of each factor, which every tensor core can do; else, and interpreted, in float32."""
    import triton

    return "ieee" if dtype == torch.float32 or triton.knobs.runtime.interpret else "bf16x3"


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """[..., C] as [n0, n1, n2, C]; a view unless more than three leading dimensions do not merge."""
    return x.flatten(0, x.dim() - 4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


class _Target:
    """Answers Triton's questions about the device for one that is not there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> Any:
        return str(self.target)  # kernels are cached by device

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def compile_only(backend: str, arch: int | str) -> Iterator[list[Compiled]]:
    """What is launched inside is compiled for a target instead, and listed; no such device is needed.

    Args:
        backend, arch: "cuda" and a compute capability such as 90, or "hip" and a name such as "gfx942".
    """
    global _compiled
    import triton
    from triton.backends.compiler import GPUTarget

    driver = triton.runtime.driver
    before = _compiled, driver._active
    found: list[Compiled] = []
    _compiled = found
    driver.set_active(_Target(GPUTarget(backend, arch, 64 if backend == "hip" else 32)))
    try:
        yield found
    finally:
        _compiled, driver._active = before
