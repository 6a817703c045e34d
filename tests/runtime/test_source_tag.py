"""Graphs that another fxfuse has compiled are not taken from torch's caches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxfuse.runtime import inner, source_tag


def test_every_source_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tag() -> str:
        return source_tag.source_tag.__wrapped__()

    assert tag() == source_tag.source_tag()
    monkeypatch.setattr(source_tag, "PACKAGES", [SimpleNamespace(__path__=[str(tmp_path)])])
    (tmp_path / "deeper").mkdir()
    seen = {tag()}
    for name, text in (("a.py", "1"), ("a.py", "2"), ("deeper/b.py", "1"), ("deeper/c.py", "")):
        (tmp_path / name).write_text(text)
        seen.add(tag())
    assert len(seen) == 5
    (tmp_path / "notes.txt").write_text("none of the sources")
    assert tag() in seen


def test_the_keys_have_it_beside_a_tag_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx
    from torch._inductor.codecache import FxGraphHashDetails

    config: Any = torch.compiler.config
    seen = []

    def compiling(graph_module: Any, inputs: Any, **options: Any) -> Any:
        seen.append(FxGraphHashDetails(graph_module, inputs, {}, []).cache_key_tag)
        return graph_module

    monkeypatch.setattr(compile_fx, "compile_fx", compiling)
    graph_module = torch.fx.symbolic_trace(torch.nn.ReLU())
    with config.patch(cache_key_tag="mine "):
        inner.compile_graph("inductor", None, graph_module, [torch.ones(3)])
        assert config.cache_key_tag == "mine "
    assert seen == [f"mine {source_tag.source_tag()}"]
