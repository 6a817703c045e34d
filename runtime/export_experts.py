"""Calibrated experts taken apart, each with scales that fit what it was calibrated as: one fused weight.

Read by: programs that load ModelOpt's checkpoints with single experts (SGLang, vLLM, TensorRT-LLM).

    experts.{e}.gate_proj.weight, .up_proj.weight, .down_proj.weight: rows of the stacks
    .weight_scale ("fp8": amax / 448) or .weight_scale_2 ("nvfp4": amax / (448 * 6)), .input_scale likewise

Gate and up were one weight when the largest absolute value (amax) was taken, so they share what is one number
for it. Several numbers are cut in proportion to the rows. What was never calibrated has the amax of the fused
weight, taken before it is split: gate and up with scales of their own could not be merged again.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from fxfuse.errors import OptionError, PlanError
from fxfuse.passes.weights import Rows, TensorSpec
from fxfuse.runtime.layouts.scales import is_stack, proportional
from fxfuse.runtime.plan import plan_of_tensors

# name of the scale of a weight, and the largest number that a scaled value may be
FORMATS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {"fp8": ("weight_scale", 448.0), "nvfp4": ("weight_scale_2", 448.0 * 6.0)}
)

Amax = Mapping[str, Sequence[torch.Tensor | None]]


def export_experts(
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    amax: Amax = MappingProxyType({}),
    input_amax: Amax = MappingProxyType({}),
    *,
    format: str = "fp8",
) -> dict[str, torch.Tensor]:
    """A state dict with its experts one by one and their scales; weights are split, not quantised.

    Args:
        tensors: a state dict with stacked experts, in transformers' names.
        config: of the model that it is of.
        amax: for the name of a stack (`...experts.gate_up_proj`), the largest absolute value of each expert:
            one number, one for equal runs of its T rows, or some for each row ([T, n]); None where it was not
            calibrated.
        input_amax: likewise for the inputs, one number for each expert; None leaves the scale out.
        format: "fp8" or "nvfp4", where the second scale of a weight is one number.

    Raises:
        OptionError: an unknown format.
        PlanError: values that do not divide with the rows, or are no amax; an unknown stack.
    """
    if format not in FORMATS:
        raise OptionError(f"format {format!r} is not known; known are: {', '.join(FORMATS)}")
    leaf, largest = FORMATS[format]
    specs = {name: TensorSpec(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()}
    planned = plan_of_tensors(config, specs, "per_expert")
    result = planned.apply(tensors)
    stacks = {source.name: source.shape for source in planned.sources if is_stack(source.name)}
    for name, values in (*amax.items(), *input_amax.items()):
        if name not in stacks or len(values) != stacks[name][0]:
            raise PlanError(f"{name}: {len(values)} values of amax, the stacks are {stacks}")
    for transform in planned.transforms:
        (block,) = transform.rows.segments
        if block.source not in stacks:
            continue
        module, shape = transform.target.name.removesuffix("weight"), stacks[block.source]
        expert = block.start // shape[1]
        given = amax.get(block.source, [None] * shape[0])[expert]
        whole = tensors[block.source][expert].float().abs().amax() if given is None else given
        own = _part(_checked(whole, block.source, expert), block, shape, expert)
        if format == "nvfp4" and own.numel() > 1:
            raise PlanError(f"{block.source}: {leaf} is one number, expert {expert} has {own.numel()}")
        result[module + leaf] = own / largest
        of_input = input_amax.get(block.source, [None] * shape[0])[expert]
        if of_input is not None:
            result[module + "input_scale"] = _checked(of_input, block.source, expert) / largest
    return result


def _part(amax: torch.Tensor, block: Rows, shape: Sequence[int], expert: int) -> torch.Tensor:
    """Of the amax of an expert's fused weight, the part for the rows that `block` takes."""
    if amax.numel() == 1:
        return amax.reshape(())
    _, high, wide = shape
    # a turned stack has output features in its columns
    turned = block.transposed and block.columns is not None
    rows = wide if turned else high
    first, last = (
        block.columns or (0, 0) if turned else (block.start - expert * high, block.stop - expert * high)
    )
    # a leading size below the number of rows is that of runs of rows
    table = amax.reshape(amax.shape[0] if amax.shape[0] % rows else rows, -1)
    found = proportional(first, last, rows, table.shape[0])
    if found is None:
        raise PlanError(
            f"{block.source}: {list(amax.shape)} values of amax for {rows} rows of expert {expert} do not "
            f"divide at rows {first}:{last}; calibrate by tensor, by row, or by blocks that divide"
        )
    part = table[found[0] : found[1]]
    return part.reshape(-1) if amax.dim() == 1 else part


def _checked(amax: torch.Tensor, name: str, expert: int) -> torch.Tensor:
    values = amax.detach().float()
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise PlanError(f"{name}: amax of expert {expert} is not finite or negative; calibrate it anew")
    return values
