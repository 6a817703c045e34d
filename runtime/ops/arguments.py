"""What operators ask of their tensors before they look at the sizes."""

import functools

from torch import Tensor

from fxfuse.errors import ShapeError


def check_tensors(operator: str, **given: tuple[str, Tensor | None]) -> None:
    """Raise ShapeError for a tensor that has not the dimensions of its layout, or is not of floating point.

    Each comes with its layout, such as "[B, T, H, D]"; the dots of "[..., D]" are any number of dimensions.
    """
    wrong = []
    for name, (layout, x) in given.items():
        if x is None:
            continue
        least, most = _dimensions(layout)
        if not least <= x.dim() <= most:
            wrong.append(f"{name} {tuple(x.shape)} is not {layout}")
        elif not x.is_floating_point():
            wrong.append(f"{name} is {str(x.dtype).removeprefix('torch.')}, not of floating point")
    if wrong:
        raise ShapeError(f"{operator}: {'; '.join(wrong)}")


@functools.cache
def _dimensions(layout: str) -> tuple[int, int]:
    named = layout.count(",") + 1
    return (named - 1, 64) if "..." in layout else (named, named)


def check_written(operator: str, **given: Tensor) -> None:
    """Raise ShapeError for a tensor whose elements share memory, as those of `expand` do: each is written."""
    for name, x in given.items():
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ShapeError(
                f"{operator} writes {name} {tuple(x.shape)} in place, and several of its elements are one in "
                f"memory (strides {x.stride()}); give it a contiguous() copy"
            )
