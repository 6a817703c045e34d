"""The command: what a person reads, which exit code a script gets, and that help does not load torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxfuse import cli
from fxfuse.errors import CheckpointError
from fxfuse.runtime.random_checkpoint import random_checkpoint

VERBS = ["inspect", "explain", "convert", "verify", "demo", "bench"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_verb() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "Usage" in out


def test_no_arguments_print_the_help() -> None:
    _, out, err = run()
    assert "Usage" in out + err


def test_the_version_is_that_of_the_package() -> None:
    import fxfuse

    assert run("--version")[1].split() == ["fxfuse", fxfuse.__version__]


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from fxfuse.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"


def test_the_module_runs_as_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "fxfuse", "--version"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("fxfuse ")


@pytest.mark.parametrize("verb", ["inspect", "explain", "demo"])
def test_an_fxfuse_error_is_one_line_and_exit_code_2(verb: str, tmp_path: Path) -> None:
    code, out, err = run(verb, str(tmp_path / "nothing"))
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("[")]  # [   0 s] is the demo's progress
    assert len(lines) == 1
    assert lines[0].startswith("fxfuse: ")
    assert "nothing" in lines[0]


def test_inspect_and_explain_describe_a_checkpoint_without_its_weights(tmp_path: Path) -> None:
    folder = random_checkpoint("small", cache=tmp_path, progress=False)
    code, out, err = run("inspect", str(folder))
    assert code == 0, err
    assert "91 tensors" in out
    assert "layers.{0..2}.linear_attn.in_proj_qkv_z_b_a.weight" in out
    (line,) = [line for line in out.splitlines() if "self_attn.q_k_v_proj.weight" in line]
    assert line.count(".layers.3.self_attn.") == 4 and "{" not in line and "*" not in line
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    code, out, err = run("explain", str(folder))
    assert code == 0, err
    assert "model.layers.{0..2}.linear_attn" in out
    assert "no weight of the model was moved" in out and "0.0 s" not in out and "0.0 MB" not in out
    assert "left alone: nothing that any pass could have matched" in out
    code, out, err = run("explain", str(folder), "--target", "cuda")
    assert code == 0, err
    assert "kernels of the decode graph" in out and "triton gdn_decode" in out


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["--debug", "inspect", str(tmp_path / "nothing")])
    assert isinstance(result.exception, CheckpointError)


def test_convert_goes_there_and_back_and_verify_says_so(tmp_path: Path) -> None:
    folder = random_checkpoint("small", cache=tmp_path / "cache", progress=False)
    there, back = tmp_path / "there", tmp_path / "back"
    code, out, err = run("convert", str(folder), str(there), "--layout", "sglang", "--shard-gb", "0.01")
    assert code == 0, err
    assert "layout sglang" in out
    assert run("convert", str(there), str(back), "--layout", "hf")[0] == 0
    for left, right in ((folder, back), (folder, there), (there, back)):
        assert run("verify", str(left), str(right))[:2] == (0, "equal, bit for bit\n")
    code, _, err = run("convert", str(folder), str(there))
    assert code == 2
    assert "exists" in err
    assert run("convert", str(folder), str(there), "--overwrite")[0] == 0
    changed = sorted(back.glob("*.safetensors"))[0]
    whole = bytearray(changed.read_bytes())
    whole[-1] ^= 1
    changed.write_bytes(whole)
    code, out, _ = run("verify", str(folder), str(back))
    assert code == 1
    assert "1 tensor differs" in out


def test_a_rank_needs_a_world(tmp_path: Path) -> None:
    code, _, err = run("convert", str(tmp_path), str(tmp_path / "x"), "--rank", "0")
    assert code == 2
    assert "belong together" in err


def test_an_unknown_option_and_an_unknown_size_are_errors() -> None:
    assert run("demo", "--no-such-option")[0] == 2
    code, _, err = run("demo", "--size", "7t")
    assert code == 2
    assert "0.8b" in err


class TestBench:
    @pytest.fixture
    def checkout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "bench").mkdir()
        (tmp_path / "pyproject.toml").touch()
        monkeypatch.setattr(cli, "__file__", str(tmp_path / "src" / "fxfuse" / "cli.py"))
        return tmp_path

    def test_the_rest_of_the_arguments_and_the_exit_code_pass_through(self, checkout: Path) -> None:
        out = checkout / "out"
        script = f"import sys; open({str(out)!r}, 'w').write(' '.join(sys.argv[1:])); sys.exit(3)"
        (checkout / "bench" / "speed.py").write_text(script)
        assert run("bench", "speed", "--size", "small", "x")[0] == 3
        assert out.read_text() == "--size small x"

    def test_without_a_name_they_are_listed(self, checkout: Path) -> None:
        for name in ("speed", "memory", "harness"):
            (checkout / "bench" / f"{name}.py").touch()
        assert run("bench")[1].split() == ["memory", "speed"]

    def test_an_unknown_name_lists_the_known_ones(self, checkout: Path) -> None:
        (checkout / "bench" / "speed.py").touch()
        code, _, err = run("bench", "sped")
        assert code == 2
        assert "speed" in err

    def test_an_installed_package_says_that_it_has_none(self, checkout: Path) -> None:
        (checkout / "pyproject.toml").unlink()
        code, _, err = run("bench", "speed")
        assert code == 2
        assert "checkout" in err
