"""Functions that capture keeps as one node instead of tracing into their loops.

The chunked delta rule unrolls over the sequence: 16 nodes for each 64 tokens, another graph for each length.
Dynamo is given a polyfill that calls the library operator when the graph is for fxfuse, and the original code
when it is for anybody else, so that a plain torch.compile in the same process sees what it always saw.
"""

import sys
import types
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator

from fxfuse.runtime import ops  # registers the operators
from fxfuse.runtime.families import FAMILIES

__all__ = ["install"]

assert ops  # imported for what it registers
_installed: set[tuple[str, str]] = set()
_lock = Lock()


def _unwrapped(compiler: object) -> object:
    """The backend behind torch.compile's wrappers."""
    for _ in range(16):
        inner = getattr(compiler, "_torchdynamo_orig_backend", None) or getattr(compiler, "compiler_fn", None)
        if inner is None or inner is compiler:
            return compiler
        compiler = inner
    return compiler


@torch._dynamo.assume_constant_result
def _capturing_for_fxfuse() -> bool:
    return getattr(
        _unwrapped(InstructionTranslator.current_tx().output.compiler_fn), "captures_leaves", False
    )


def _copy(function: types.FunctionType) -> types.FunctionType:
    """The same code under another identity: Dynamo would replace the original inside its own replacement."""
    copied = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _chunked_leaf(original: types.FunctionType) -> Callable[..., Any]:
    plain = _copy(original)

    def chunk_gated_delta_rule(*args: Any, **kwargs: Any) -> Any:
        if not _capturing_for_fxfuse() or kwargs.get("cu_seqlens") is not None or len(args) != 3:
            return plain(*args, **kwargs)
        out, state = torch.ops.fxfuse.chunk_gated_delta_rule(
            args[0],
            args[1],
            args[2],
            kwargs["g"],
            kwargs["beta"],
            kwargs.get("initial_state"),
            kwargs.get("use_qk_l2norm_in_kernel", False),
        )
        return out, (state if kwargs.get("output_final_state", False) else None)

    return chunk_gated_delta_rule


def install() -> None:
    """Register the leaves of every known family whose module is loaded; cheap to repeat, never undone.

    A function that is not there (another version of transformers) is left to be traced like any other code.
    """
    with _lock:
        for family in FAMILIES:
            if family.modeling is None:
                continue
            module_name, function_name = family.modeling, family.delta_rule
            module = sys.modules.get(module_name)
            original = getattr(module, function_name, None)
            if original is None or (module_name, function_name) in _installed:
                continue
            polyfill = _chunked_leaf(original)
            torch.compiler.substitute_in_graph(original, skip_signature_check=True)(polyfill)
            _installed.add((module_name, function_name))
