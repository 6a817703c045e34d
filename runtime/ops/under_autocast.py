"""Under autocast an operator takes its tensors as they are, and computes in the dtypes that it says.

Without this its reference would run under autocast, too, and round what it keeps in float32: the state of a
delta rule.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet

_library = torch.library.Library("fxfuse", "FRAGMENT")
_KEYS = (DispatchKey.AutocastCPU, DispatchKey.AutocastCUDA)


def _kernel(name: str, key: DispatchKey) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(key)):
            return getattr(torch.ops.fxfuse, name).default(*args, **kwargs)

    return call


def register() -> None:
    """For every operator of the namespace that is defined by now, but for those that are others in one."""
    composite = "CompositeImplicitAutograd"
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        if namespace == "fxfuse" and not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, composite):
            for key in _KEYS:
                _library.impl(name, _kernel(name, key), key.name)
