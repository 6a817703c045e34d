"""The `fxfuse` command. Each verb calls the function that does the work and prints what it returns.

torch and transformers are imported by the verbs, not here: `fxfuse --help` answers at once.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from io import TextIOWrapper
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fxfuse.errors import FxfuseError, OptionError, UnsupportedModelError, in_one_line

# Newer versions of typer carry a copy of click, older ones use click itself.
UsageError: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """Says what went wrong in one line, without a traceback, where it is the user's to mend."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:  # typer shows the help
            return super().parse_args(ctx, args)
        with _one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _one_line(ctx: Any) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # the last as of `| head`, which is no error
        raise
    except UsageError as error:
        said = error.format_message().rstrip(".")
        _leave(f"{said}. See: {(error.ctx or ctx).command_path} --help", 2, error)
    except KeyboardInterrupt as error:
        _leave("stopped", 130, error)
    except Exception as error:  # left to Python it would exit with 1, which says that a result differs
        if ctx.params.get("debug"):
            raise
        _leave(_in_words(error), 2, error)


def _in_words(error: Exception) -> str:
    if isinstance(error, FxfuseError):
        return str(error)
    if isinstance(error, ImportError):
        return f"a package cannot be imported ({_cause(error)}): install or mend it; --debug shows who asks"
    if isinstance(error, OSError):
        return f"{error.filename or type(error).__name__}: {error.strerror or error}; name another"
    return f"{_cause(error)}: this was not foreseen; `fxfuse --debug` before the verb shows where it is"


def _cause(error: BaseException) -> str:
    """In one line the exception that others were raised for."""
    while error.__cause__ is not None:
        error = error.__cause__
    return in_one_line(error)


def _leave(text: str, code: int, cause: BaseException) -> NoReturn:
    typer.echo(f"fxfuse: {' '.join(text.split())}", err=True)
    raise typer.Exit(code) from cause


class Size(StrEnum):
    """Checkpoints with random weights that the demo can write."""

    SMALL = "small"
    B0_8 = "0.8b"
    B2 = "2b"


Checkpoint = Annotated[
    Path, typer.Argument(help="Folder with config.json and *.safetensors.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text, for machines.")]

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite the graphs of Hugging Face Qwen3.5-family models, and their weights to match. "
    "Begin with [bold]fxfuse demo[/bold], which needs no checkpoint.",
    rich_markup_mode="rich",
    epilog="Exit codes: 0 as expected, 1 a result differs, 2 fxfuse cannot do what was asked, "
    "130 stopped by Ctrl-C. Progress and errors go to stderr, results to stdout; --debug shows the "
    "traceback of an error.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fxfuse {version('fxfuse')}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Options that stand before the verb."""
    if isinstance(sys.stdout, TextIOWrapper):  # not every name, arrow or frame can be written everywhere
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave_out_torchvision() -> None:
    """Keep a torchvision that was built for another torch from breaking what needs none of it.

    Importing it raises, and transformers, which takes every package that is installed for a working one,
    imports it beside its models.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        typer.echo(f"torchvision is left out, since it cannot be imported ({_cause(error)})", err=True)


@app.command(
    epilog="Example: fxfuse inspect ./Qwen3.5-0.8B. What a model run would match says fxfuse explain."
)
def inspect(checkpoint: Checkpoint, json: Json = False) -> None:
    """List what a checkpoint holds and which of its tensors fxfuse merges. Reads headers, no weights."""
    _leave_out_torchvision()
    from fxfuse.runtime.faults import read_checked
    from fxfuse.runtime.plan import plan

    headers = {name: entry.spec for name, entry in read_checked(checkpoint)[0].items()}
    parts: dict[tuple[str, str], list[int]] = {}
    for name, spec in headers.items():
        # model.language_model.layers.0... belongs to model.language_model, mtp.fc.weight to mtp
        part = ".".join(name.split(".")[:2]) if name.startswith("model.") else name.split(".")[0]
        parts.setdefault((part, spec.dtype or "?"), []).append(spec.rows * spec.width)
    if json:
        found = [
            {"part": part, "dtype": dtype, "tensors": len(sizes), "values": sum(sizes)}
            for (part, dtype), sizes in parts.items()
        ]
        _print_json(
            {"checkpoint": str(checkpoint), "parts": found, "plan": loads(plan(checkpoint).to_json())}
        )
        return
    typer.echo(f"{checkpoint}: {_tensors(len(headers))}")
    for (part, dtype), sizes in parts.items():
        typer.echo(f"  {part:<28} {dtype:<10} {len(sizes):>5} tensors {sum(sizes):>16,} values")
    # last, so that a checkpoint without a plan is listed all the same
    typer.echo(str(plan(checkpoint)))


@app.command(epilog="Example: fxfuse explain ./Qwen3.5-0.8B --html report.html, then open the page.")
def explain(
    checkpoint: Checkpoint,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the blocks before and after, drawn.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="auto, cpu or cuda. For cuda the kernels of each kind of layer are listed.")
    ] = "auto",
    json: Json = False,
) -> None:
    """Say what the passes would match in a checkpoint's model, and what is left alone. Reads no weights."""
    _leave_out_torchvision()
    from rich.console import Console

    import fxfuse

    if html is not None:
        _need_file(html, "--html")
    with Console(stderr=True).status("capturing a prompt and one token"):  # seen on a terminal alone
        report = fxfuse.explain(_model_without_weights(checkpoint), target=target)
    if html is not None:
        with _writing(html, "--html"):
            report.to_html(html)
        typer.echo(f"written: {html}", err=True)
    if json:
        _print_json(report.to_dict())
    else:
        typer.echo(str(report))


def _need_file(file: Path, option: str) -> None:
    if not file.parent.is_dir():
        raise OptionError(f"{option} {file}: there is no folder {file.parent}: create it, or name another")
    if file.is_dir():
        raise OptionError(f"{option} {file}: is a folder: name a file in it")
    with _writing(file, option):  # what cannot be written is said before the work, not after it
        new = not file.exists()
        file.open("a").close()
        if new:
            file.unlink()


@contextmanager
def _writing(file: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(f"{option} {file}: {error.strerror or error}: name another file") from error


def _model_without_weights(checkpoint: Path) -> Any:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from fxfuse.runtime.headers import read_config

    read_config(checkpoint)  # a folder without one is our error, and shorter than transformers'
    if not sys.stderr.isatty():
        transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    except ImportError:
        raise
    except Exception as error:  # whatever transformers and the values of a config come to
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot build a causal language model from "
            f"{checkpoint / 'config.json'} ({_cause(error)}); of any other model, "
            "fxfuse.explain(model, inputs=...) in Python makes the same report"
        ) from error


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _print_json(found: Any) -> None:
    typer.echo(dumps(found, indent=2))


@app.command(epilog="Example: fxfuse convert ./Qwen3.5-0.8B ./for-sglang --layout sglang")
def convert(
    source: Checkpoint,
    destination: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    layout: Annotated[
        str, typer.Option(help="hf, fused, per_expert, qwen3_next, qwen3_5, sglang or fastdeploy.")
    ] = "fused",
    rank: Annotated[int | None, typer.Option(help="With --world: write what this rank holds.")] = None,
    world: Annotated[int | None, typer.Option(help="Number of tensor-parallel ranks.")] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest size of a file, in GB.")] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint in another layout, a piece at a time. `--layout hf` leads back, bit for bit."""
    _leave_out_torchvision()
    from fxfuse.runtime.convert import convert as run

    if (rank is None) != (world is None):
        raise OptionError("--rank and --world belong together: give both or none")
    tp = None if rank is None or world is None else (rank, world)
    with _bar() as progress:
        result = run(
            source,
            destination,
            layout,
            tp=tp,
            progress=progress,
            shard_bytes=int(shard_gb * 10**9),
            overwrite=overwrite,
        )
    typer.echo(result.to_json() if json else str(result))


@app.command(epilog="Example: fxfuse verify ./Qwen3.5-0.8B ./for-sglang && echo the same weights")
def verify(
    left: Checkpoint,
    right: Annotated[Path, typer.Argument(help="Folder to compare with.", show_default=False)],
    json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor, bit for bit, in any layouts. Exits with 1 if they differ."""
    _leave_out_torchvision()
    from fxfuse.runtime.convert import differences

    with _bar() as progress:
        found = list(differences(left, right, progress))
    if json:
        _print_json({"equal": not found, "differences": found})
    else:
        for line in found:
            typer.echo(line)
        differ = "differs" if len(found) == 1 else "differ"
        typer.echo(f"{_tensors(len(found))} {differ}" if found else "equal, bit for bit")
    raise typer.Exit(1 if found else 0)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes, where somebody watches."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


@app.command(epilog="Example: fxfuse demo --size 0.8b, or fxfuse demo ./Qwen3.5-0.8B --tokens 256")
def demo(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a checkpoint. Without one, random weights are written to a cache, once."
        ),
    ] = None,
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = Size.SMALL,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens to generate.")] = 64,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where the random checkpoint is kept, if not in ~/.cache/fxfuse.", envvar="FXFUSE_CACHE"
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file, too.")] = None,
) -> None:
    """Run the main job on real input and judge it: equality, error, speed. Exits with 1 if any differ."""
    _leave_out_torchvision()
    from fxfuse.runtime.demo import run

    if json is not None:
        _need_file(json, "--json")
    result = run(checkpoint, size=size.value, tokens=tokens, cache=cache)
    if json is not None:
        with _writing(json, "--json"):
            json.write_text(result.to_json() + "\n")
    raise typer.Exit(1 if result.differences else 0)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: fxfuse bench decode --help",
)
def bench(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="Benchmark to run; without one, they are listed.")
    ] = None,
) -> None:
    """Run a benchmark of the source checkout; what follows its name is passed on to it."""
    folder = Path(__file__).parents[2] / "bench"
    if not (folder.parent / "pyproject.toml").is_file():
        raise OptionError("benchmarks are not installed with the package: run this from a source checkout")
    # What they share lies beside them.
    shared = {"generation", "harness", "models", "processes"}
    known = sorted(file.stem for file in folder.glob("*.py") if file.stem not in shared)
    if name is None:
        typer.echo("\n".join(known) if known else f"no benchmarks in {folder} yet")
    elif name not in known:
        raise OptionError(
            f"unknown benchmark {name!r}: choose one of {', '.join(known) or '(there are none yet)'}"
        )
    else:
        raise typer.Exit(subprocess.call([sys.executable, str(folder / f"{name}.py"), *ctx.args]))
