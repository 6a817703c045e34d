"""What Inductor prepares once per process for CPUs, begun while Dynamo still captures.

Before its first kernel it asks the C++ compiler and a fresh Python which vector instructions run here, and
precompiles its headers: some ten seconds in which one core waits for others. All of it is in place after any
small kernel, so one is compiled on a thread of its own.
"""

import logging
import threading
from functools import cache

log = logging.getLogger("fxfuse")

KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* values)
{
    at::vec::Vectorized<float>::loadu(values).store(values);
}
"""


@cache
def begin() -> threading.Thread:
    """Start it, once per process; what is compiled afterwards joins the thread."""
    # Imported here, not there: two threads that import modules of one another see them half made.
    import torch._inductor.compile_fx  # noqa: F401
    from torch._inductor.async_compile import AsyncCompile

    def compile_one() -> None:
        try:
            kernel = AsyncCompile().cpp_pybinding(["float*"], KERNEL)
            if hasattr(kernel, "result"):
                kernel.result()
        except Exception as error:  # a compiler that is missing, say: compiling the graph says so, and better
            log.debug("Inductor's C++ compiler could not be prepared: %s", error)

    thread = threading.Thread(target=compile_one, name="fxfuse-warm-up", daemon=True)
    thread.start()
    return thread
