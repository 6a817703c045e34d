"""Tensors for tests: small integers, on which sums are exact, and NaN, which shows up wherever it is read."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["integer_like_", "integer_tensor", "poison"]

Target = TypeVar("Target", bound="nn.Module | Tensor | Iterable[Tensor]")


def _fill(tensor: Tensor, generator: torch.Generator, low: int, high: int) -> None:
    # Drawn on the CPU whatever the device, so that one seed means one set of values everywhere.
    drawn = torch.randint(low, high + 1, tensor.shape, generator=generator)
    with torch.no_grad():
        tensor.copy_(drawn)


def integer_like_(target: Target, seed: int, low: int = -2, high: int = 2) -> Target:
    """Fill parameters with integers drawn uniformly from `low` to `high`, both included; in place.

    A product of such values is exact, and so is a sum of products in fp32 in any order, as long as no
    partial sum reaches 2**24: for a matrix product over K terms, K * max|weight| * max|input| < 2**24. With
    the default range on both sides that is K < 4,194,304; with bf16 storage the bound is the same, since
    products are accumulated in fp32 and the exact sum is rounded once. What follows a non-linear function
    (a norm, a gate, softmax) is not an integer any more: use the exact oracle block by block, and the
    reference oracle for whole models.

    Args:
        target: a module (its parameters, not its buffers), a tensor, or tensors; any floating dtype.
        seed: decides every value, on every device.

    Returns:
        `target`.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: Iterable[Tensor]
    if isinstance(target, nn.Module):
        tensors = target.parameters()
    elif isinstance(target, Tensor):
        tensors = [target]
    else:
        tensors = target
    for tensor in tensors:
        _fill(tensor, generator, low, high)
    return target


def integer_tensor(
    shape: Sequence[int],
    seed: int,
    low: int = -2,
    high: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A tensor of `shape` filled as by `integer_like_`, for inputs."""
    return integer_like_(torch.empty(tuple(shape), dtype=dtype, device=device), seed, low, high)


def poison(tensor: Tensor) -> Tensor:
    """Fill a floating tensor with NaN in place and return it: whatever reads it before writing shows it.

    Raises:
        TypeError: the tensor cannot hold a NaN.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"a tensor of {tensor.dtype} cannot hold NaN: poison floating tensors")
    with torch.no_grad():
        return tensor.fill_(float("nan"))
