"""What runs a rewritten graph: Inductor, AOTAutograd in eager mode, or the graph as it is."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch.fx import GraphModule

from fxfuse.runtime import cuda_graphs, warm_up
from fxfuse.runtime.options import Inner, Mode
from fxfuse.runtime.outline import outlined, repeats
from fxfuse.runtime.source_tag import source_tag

Waiting = list[tuple[Any, dict[str, Any]]]  # what compiles, and the scope of the code that calls it

_waiting_is_ours = threading.RLock()


def cpp_compiler_is_missing() -> bool:
    """Inductor writes C++ for CPUs, and cannot run there without a compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return True
    return False


def available(inner: Inner, inputs: Sequence[Any]) -> tuple[Inner, str | None]:
    """The inner backend that can run here, and why it is another one than asked for."""
    on_cpu = all(t.device.type in ("cpu", "meta") for t in inputs if isinstance(t, torch.Tensor))
    if inner == "inductor" and on_cpu and cpp_compiler_is_missing():
        return (
            "eager",
            "no C++ compiler was found, so Inductor cannot run: graphs run as they are (inner='eager')",
        )
    return inner, None


def compile_graph(
    inner: Inner, mode: Mode | None, graph_module: GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """A callable for the graph; `inputs` are example values, fake where there is no memory yet."""
    if inner == "eager":
        return graph_module
    if inner == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, list(inputs))
    if mode in (None, "default") and not needs_gradients(inputs) and repeats(graph_module):
        return outlined(graph_module, _inductor)
    if mode in cuda_graphs.WITHOUT:
        cuda_graphs.keep_addresses(graph_module)
    return _inductor(graph_module, inputs, mode)


def needs_gradients(inputs: Sequence[Any]) -> bool:
    """Whether a backward is compiled too: what a graph computes inside does not say that it requires one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def begun(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[[], Callable[..., Any]]:
    """Inductor's code for a graph, while the C++ compiler goes on working on its kernels.

    What it returns waits for them and gives the callable, or raises what compiling a kernel raises.
    """
    waiting: Waiting = []
    with _put_off(waiting):
        call = _inductor(graph_module, inputs)

    def finished() -> Callable[..., Any]:
        _wait_for(waiting)
        return call

    return finished


@contextmanager
def kernels_compiled_beside() -> Iterator[None]:
    """Within it the C++ compiler works on one piece of a graph while Inductor writes the next.

    All kernels are waited for once, at the end. Raises what compiling a kernel raises.
    """
    waiting: Waiting = []
    try:
        with _put_off(waiting):
            yield
    except BaseException:
        with suppress(Exception):
            _wait_for(waiting)
        raise
    _wait_for(waiting)


@contextmanager
def _put_off(waiting: Waiting) -> Iterator[None]:
    """What Inductor waits for in this thread, as it loads the code that calls kernels, is put on the list."""
    from torch._inductor.async_compile import AsyncCompile

    own = threading.get_ident()

    def wait(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == own:
            waiting.append((compiler, scope))
        else:
            at_once(compiler, scope)

    with _waiting_is_ours:
        at_once = AsyncCompile.wait
        AsyncCompile.wait = wait  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            AsyncCompile.wait = at_once  # type: ignore[method-assign]


def _wait_for(waiting: Waiting) -> None:
    """Wait for the kernels of loaded code; where one does not compile, nobody loads that code again."""
    from torch._inductor.codecache import PyCodeCache

    failures, kept = [], PyCodeCache.modules_no_attr
    for compiler, scope in waiting:
        try:
            compiler.wait(scope)
        except Exception as error:
            failures.append(error)
            for path in [path for path, module in kept.items() if vars(module) is scope]:
                del kept[path]
    if failures:
        raise failures[0]


def _inductor(
    graph_module: GraphModule, inputs: Sequence[Any], mode: Mode | None = None
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    if all(value.device.type == "cpu" for value in inputs if isinstance(value, torch.Tensor)):
        warm_up.begin().join()
    patches = None if mode in (None, "default") else list_mode_options(mode)
    compiler: Any = torch.compiler.config
    with compiler.patch(cache_key_tag=compiler.cache_key_tag + source_tag()):
        compiled = compile_fx(graph_module, list(map(_by_its_symbol, inputs)), config_patches=patches)
    return cast(Callable[..., Any], compiled)


def _by_its_symbol(value: Any) -> Any:
    """A size that was found equal to another one, by that one's symbol.

    Inductor gives an input the name that it had, and computes with the other one, which nothing else in a
    piece of a graph may bring along.
    """
    if not isinstance(value, torch.SymInt) or value.node._expr == value.node.expr:
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)
