"""The command for people and for machines: help one can act on, JSON, pages, errors in one line."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxfuse import cli
from fxfuse.runtime.random_checkpoint import random_checkpoint

VERBS = ["inspect", "explain", "convert", "verify", "demo", "bench"]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], terminal_width=200)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("small", cache=tmp_path_factory.mktemp("cache"), progress=False)


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_for_gives_an_example_and_explains_every_argument(verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0 and f"Example: fxfuse {verb}" in re.sub(r"\s+", " ", out)
    command: Any = next(c for c in cli.app.registered_commands if c.callback.__name__ == verb)
    assert len(command.callback.__doc__) > 30
    for line in out.splitlines():
        option = re.search(r"│ (?:\*\s+)?(--[a-z-]+)", line)
        assert option is None or re.search(r"[a-z]{3}.* [a-z]{2}", line.replace(option[1], "")), line


def test_help_of_the_command_has_exit_codes_and_where_to_begin() -> None:
    out = re.sub(r"\s+", " ", run("--help")[1])
    for said in (
        "Begin with fxfuse demo",
        "0 as expected",
        "1 a result differs",
        "2 fxfuse cannot",
        "130 stopped by Ctrl-C",
        "--debug",
    ):
        assert said in out


def test_json_of_inspect_explain_convert_and_verify_is_all_that_stdout_has(
    folder: Path, tmp_path: Path
) -> None:
    code, out, _ = run("inspect", folder, "--json")
    found = json.loads(out)
    assert code == 0 and sum(part["tensors"] for part in found["parts"]) == 91 and found["plan"]
    code, out, _ = run("explain", folder, "--json")
    assert code == 0 and {row["rule"] for row in json.loads(out)["rows"]} >= {"same_input_linears"}
    code, out, _ = run("convert", folder, tmp_path / "there", "--layout", "sglang", "--json")
    assert code == 0 and isinstance(json.loads(out), dict)
    code, out, _ = run("verify", folder, tmp_path / "there", "--json")
    assert code == 0 and json.loads(out) == {"equal": True, "differences": []}
    shard = sorted((tmp_path / "there").glob("*.safetensors"))[0]
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(whole)
    code, out, _ = run("verify", folder, tmp_path / "there", "--json")
    assert code == 1 and json.loads(out)["equal"] is False and len(json.loads(out)["differences"]) == 1


def test_explain_writes_the_page_that_a_report_writes_without_reading_weights(
    folder: Path, tmp_path: Path
) -> None:
    without = tmp_path / "without"
    without.mkdir()
    (without / "config.json").write_bytes((folder / "config.json").read_bytes())
    code, _, err = run("explain", without, "--html", tmp_path / "page.html")
    assert code == 0 and "page.html" in err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 12 and "model.layers.{0..2}.linear_attn.in_proj_qkv_z_b_a" in page


def _no_config(folder: Path) -> list[object]:
    return ["explain", folder]


def _no_tensors(folder: Path) -> list[object]:
    return ["inspect", folder]


def _unknown_model(folder: Path) -> list[object]:
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    return ["explain", folder]


def _broken_config(folder: Path) -> list[object]:
    (folder / "config.json").write_text("{")
    return ["explain", folder]


def _no_folder_for_the_page(folder: Path) -> list[object]:
    return ["explain", folder, "--html", folder / "nowhere" / "page.html"]


def _page_that_is_a_folder(folder: Path) -> list[object]:
    return ["explain", folder, "--html", folder]


def _page_that_cannot_be_written(folder: Path) -> list[object]:
    path = random_checkpoint("small", cache=folder, progress=False)
    return ["explain", path, "--html", "/dev/full"]


def _truncated_shard(folder: Path) -> list[object]:
    path = random_checkpoint("small", cache=folder, progress=False)
    shard = max(path.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    return ["demo", path]


def _taken_destination(folder: Path) -> list[object]:
    source = random_checkpoint("small", cache=folder / "cache", progress=False)
    (folder / "new").mkdir()
    return ["convert", source, folder / "new", "--layout", "sglang"]


def _unknown_layout(folder: Path) -> list[object]:
    random_checkpoint("small", cache=folder / "cache", progress=False)
    folder = next((folder / "cache").iterdir())
    return ["convert", folder, folder.parents[1] / "new", "--layout", "sglangg"]


def _unknown_benchmark(folder: Path) -> list[object]:
    return ["bench", "no-such"]


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (_no_config, "config.json"),
        (_no_tensors, "config.json"),
        (_unknown_model, "no_such_model"),
        (_broken_config, "config.json"),
        (_no_folder_for_the_page, "nowhere"),
        (_page_that_is_a_folder, "is a folder"),
        (_page_that_cannot_be_written, "--html /dev/full: No space left"),
        (_truncated_shard, ".safetensors: not a readable"),
        (lambda folder: ["demo", "no-such-folder"], "no-such-folder: not a directory"),
        (lambda folder: ["demo", folder], "config.json: missing"),
        (lambda folder: ["demo", "--json", "/proc/found.json"], "--json /proc/found.json: No such file"),
        (lambda folder: ["inspect", folder], "give the directory of a checkpoint"),
        (_taken_destination, "new: exists; choose another folder, or replace it by --overwrite"),
        (_unknown_layout, "sglangg"),
        (_unknown_benchmark, "no-such"),
    ],
)
def test_an_error_is_one_line_on_stderr_that_names_the_thing(prepare: Any, says: str, tmp_path: Path) -> None:
    code, out, err = run(*prepare(tmp_path))
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (2, "", 1), (code, out, err)
    assert lines[0].startswith("fxfuse: ") and says in lines[0] and len(lines[0]) > 40


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such"], "No such command 'no-such'"),
        (["inspect"], "Missing argument"),
        (["inspect", ".", "--no-such"], "No such option: --no-such"),
        (["--no-such"], "No such option: --no-such"),
        (["demo", "--tokens", "1"], "--tokens"),
        (["demo", "--json", "nowhere/found.json"], "there is no folder nowhere"),
        (["inspect", "a", "b"], "unexpected extra argument"),
        (["verify", "a"], "Missing argument"),
        (["convert", "a", "b", "--shard-gb", "0"], "--shard-gb"),
        (["demo", "--size", "7b"], "'small', '0.8b', '2b'"),
    ],
)
def test_a_wrong_argument_is_one_line_with_the_next_step(arguments: list[str], says: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), (code, out, err)
    assert says in err and ((". See: " in err and "--help" in err) or "create it" in err)
    assert ".." not in err


def test_a_package_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fxfuse.runtime.convert", None)
    code, out, err = run("verify", "a", "b")
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert "install or mend it" in err and "fxfuse.runtime.convert" in err


def test_an_interrupt_is_one_line_and_the_shells_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfuse.runtime import convert

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "differences", interrupted)
    assert run("verify", "a", "b") == (130, "", "fxfuse: stopped\n")


def test_output_can_be_cut_off(folder: Path) -> None:
    """As `| head` does: no traceback."""
    command = f"{sys.executable} -m fxfuse inspect {folder} --json | head -1"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert found.stdout == "{\n" and "Traceback" not in found.stderr


def test_what_nobody_foresaw_is_one_line_and_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would exit with 1, which says that two checkpoints differ."""
    from fxfuse.runtime import convert

    def fails(*args: Any) -> Any:
        try:
            {}["key"]
        except KeyError as error:
            raise RuntimeError("what came of it") from error

    monkeypatch.setattr(convert, "differences", fails)
    code, out, err = run("verify", "a", "b")
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert "KeyError: 'key'" in err and "--debug" in err
    with pytest.raises(RuntimeError, match="what came of it"):
        CliRunner().invoke(cli.app, ["--debug", "verify", "a", "b"], catch_exceptions=False)


BROKEN = """
raise RuntimeError("operator torchvision::nms does not exist\\nmore than anybody wants to know")
"""


def test_a_torchvision_that_cannot_be_imported_is_left_out(folder: Path, tmp_path: Path) -> None:
    """One that was built for another torch: transformers imports it beside models that need none of it."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN)
    code = (
        "import sys; from fxfuse.cli import app\n"
        "for arguments in (['inspect', sys.argv[1]], ['explain', sys.argv[1]]):\n"
        "    app(arguments, standalone_mode=False)\n"
        "from transformers.utils import is_torchvision_available\n"
        "assert not is_torchvision_available()"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "91 tensors" in found.stdout and "same_input_linears" in found.stdout
    said = [line for line in found.stderr.splitlines() if "torchvision" in line]
    assert said == [
        "torchvision is left out, since it cannot be imported (RuntimeError: operator torchvision::nms does "
        "not exist)"
    ]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where tests run in a shell's background, which starts them with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_a_conversion_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfuse.runtime import checkpoint_writer

    write, written = checkpoint_writer._write, 0

    def interrupted(*args: Any) -> None:
        nonlocal written
        written += 1
        if written == 5:
            signal.raise_signal(signal.SIGINT)
        write(*args)

    monkeypatch.setattr(checkpoint_writer, "_write", interrupted)
    assert run("convert", folder, tmp_path / "new") == (130, "", "fxfuse: stopped\n")
    assert written == 5 and not list(tmp_path.iterdir())


def test_a_folder_whose_name_is_no_utf8(folder: Path, tmp_path: Path) -> None:
    named = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        named.symlink_to(folder)
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    code, out, err = run("inspect", named)
    assert code == 0 and "91 tensors" in out, err
    code, out, err = run("inspect", named, "--json")
    assert code == 0 and json.loads(out)["checkpoint"] == str(named), err
    new = tmp_path / os.fsdecode(b"\xff")
    code, out, err = run("convert", named, new, "--layout", "sglang")
    assert code == 0 and "layout sglang" in out and run("verify", named, new)[0] == 0, err
    code, out, err = run("inspect", tmp_path / os.fsdecode(b"\xfe"))
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "not a directory" in err


def test_an_encoder_decoder_is_explained_from_python_and_refused_here(tmp_path: Path) -> None:
    fields = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "vocab_size": 32}))
    code, out, err = run("explain", tmp_path)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert "cannot build a causal language model" in err and "fxfuse.explain(model, inputs=...)" in err
    code, out, err = run("inspect", tmp_path)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err


def test_a_family_without_a_plan_is_told_what_takes_it(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("model*"):
        os.link(file, tmp_path / file.name)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, out, err = run("inspect", tmp_path)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert "no family is known for model_type 'llama'" in err and "fxfuse explain" in err
