"""The report: a table on a terminal, one log line elsewhere, a page with drawings, speed if measured."""

import copy
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import OptionError, UnsupportedModelError
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.runtime import inner, measure
from fxfuse.runtime.grouped_names import grouped
from fxfuse.runtime.optimize import optimization_report
from fxfuse.runtime.pictures import Box
from fxfuse.runtime.report import GraphRecord
from fxfuse.runtime.svg import HEIGHT, WIDEST, draw

Make = Callable[..., Any]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def called(model: nn.Module, **options: Any) -> fxfuse.Report:
    fxfuse.optimize(model, **{"inner": "eager", **options})
    with torch.no_grad():
        model(torch.randn(2, 5, 8))
    report = optimization_report(model)
    assert report is not None and report.calls == 1
    return report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table_and_a_log_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fxfuse"):
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        called(Gated())
        assert "same_input_linears" in screen.getvalue() and "2 linears → 1" in screen.getvalue()
        assert not caplog.records
        called(Gated(), report="log")
        lines = [r.getMessage() for r in caplog.records]
        assert len(lines) == 1 and "same_input_linears 1 of 1" in lines[0] and "\n" not in lines[0]
        called(Gated(), report="off")
        assert len(caplog.records) == 1
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        called(Gated())
        assert len(caplog.records) == 2


def test_layers_are_grouped_and_equal_reasons_are_said_once(make_model: Make) -> None:
    model = make_model(layers=("full_attention",) * 3)
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda *args: None)
    report = fxfuse.explain(model, inner="eager")
    places = {row.where for row in report.rows}
    assert {"model.layers.{0..2}.self_attn.q_k_v_proj", "model.layers.{0..2}.mlp.up_proj"} <= places
    assert report.reasons()["its module has a forward hook"] == ["model.layers.{0..2}.mlp.up_proj"]


def test_numbers_of_layers_are_spans_of_one_number_alone() -> None:
    def places(numbers: Iterable[int], text: str = "model.layers.{}.mlp") -> list[str]:
        return [text.format(number) for number in numbers]

    assert grouped(places(range(23))) == ["model.layers.{0..22}.mlp"]
    assert grouped(places([7])) == ["model.layers.7.mlp"]
    assert grouped(places([4, 0, 2, 1, 6, 5])) == ["model.layers.{0..2,4..6}.mlp"]
    # in a hybrid model every fourth layer is another one: the first two spans and the last
    assert grouped(places(i for i in range(23) if i % 4 != 3)) == ["model.layers.{0..2,4..6,…,20..22}.mlp"]
    assert grouped(places([10, 9, 11, 0])) == ["model.layers.{0,9..11}.mlp"]  # by number, not by letters
    # a digit within a name is no number of a layer, and other names are other groups
    assert grouped(["a.0.q8", "a.1.q8", "a.1.q4", "lm_head"]) == ["a.{0..1}.q8", "a.1.q4", "lm_head"]
    assert grouped(places(range(3), "layers.{}")) == ["layers.{0..2}"]


def test_layers_of_one_place_are_one_line_with_the_number_of_each() -> None:
    def outcome(rule: str, matched: Iterable[int], missed: Iterable[int] = ()) -> Outcome:
        where = "model.layers.{}.mlp".format
        return Outcome(
            [Match(rule, where(i), (), "2 linears → 1") for i in matched],
            [Miss(rule, where(i), f"linear_{i}", "its module has a forward hook") for i in missed],
        )

    merged = {"same_input_linears": outcome("same_input_linears", range(23), missed=(23, 24))}
    report = fxfuse.Report([GraphRecord(phase, 9, 8, "eager", merged) for phase in ("prefill", "decode")])
    assert {(row.where, row.phase, row.matched, row.candidates) for row in report.rows} == {
        (f"model.layers.{{{span}}}.mlp", phase, matched, candidates)
        for span, matched, candidates in (("0..22", 23, 23), ("23..24", 0, 2))
        for phase in ("prefill", "decode")
    }
    lines = {(where, detail): counts for (_, where, detail), counts, _ in report.lines()}
    assert lines == {
        ("model.layers.{0..22}.mlp", "2 linears → 1"): {"prefill": "23 of 23", "decode": "23 of 23"},
        ("model.layers.{23..24}.mlp", "left alone"): {"prefill": "0 of 2", "decode": "0 of 2"},
    }
    assert report.reasons() == {"its module has a forward hook": ["model.layers.{23..24}.mlp"]}


def test_a_reason_that_names_its_own_weight_is_said_once_for_all_places() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Gated(), Gated()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    model = fxfuse.optimize(Two(), inner="eager")
    model(torch.randn(3, 8))
    report = optimization_report(model)
    assert report is not None
    (reason, places), *others = report.reasons().items()
    assert reason.startswith("grad mode is on and its weight is trainable") and len(places) == 4
    assert not others


# The page.


class Page(HTMLParser):
    """Tags, text, and a check that every element is closed."""

    EMPTY = ("meta", "rect", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and kind in (None, a.get("class"))]


@pytest.fixture(scope="module")
def page(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[fxfuse.Report, Page]:
    report = fxfuse.explain(make_model(), inner="eager")
    path = report.to_html(tmp_path_factory.mktemp("page") / "report.html")
    return report, Page(path.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_from_elsewhere(page: tuple[fxfuse.Report, Page]) -> None:
    for tag, attributes in page[1].tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not attributes.keys() & {"src", "href", "xlink:href"}


def test_the_page_has_the_table_and_both_sides_of_each_kind_of_block(
    page: tuple[fxfuse.Report, Page],
) -> None:
    report, parsed = page
    for row in report.rows:
        assert row.where in parsed.text and f"{row.matched} of {row.candidates}" in parsed.text
    blocks = {"model.layers.*.linear_attn", "model.layers.*.self_attn", "model.layers.*.mlp"}
    drawn = {(p.block, p.phase) for graph in report.graphs for p in graph.pictures}
    assert drawn == {(block, phase) for block in blocks for phase in ("prefill", "decode")}
    labels = [a["aria-label"] for a in parsed.of("svg")]
    assert sorted(labels) == sorted(f"{b}, {p}, {s}" for b, p in drawn for s in ("before", "after"))


def test_what_is_wider_than_a_window_is_scrolled_by_itself(tmp_path: Path) -> None:
    report = fxfuse.explain(Gated(), inputs={"x": torch.randn(2, 8)}, inner="eager")
    text = report.to_html(tmp_path / "x.html").read_text(encoding="utf-8")
    assert re.search(r"figure, \.wide \{[^}]*overflow-x: auto", text)
    assert text.count("<table>") == text.count('<div class="wide"><table>') == 2
    assert text.count("<svg ") == len(re.findall(r"<figure[^>]*><figcaption>[^<]*</figcaption><svg ", text))
    assert not re.search(r"svg \{[^}]*max-width", text)  # shrunk to a telephone nobody could read it


def test_what_a_rewrite_replaced_is_marked_on_both_sides(page: tuple[fxfuse.Report, Page]) -> None:
    pictures = {p.block: p for p in page[0].graphs[0].pictures}
    for block, members in (("linear_attn", 4), ("self_attn", 3), ("mlp", 2)):
        picture = pictures[f"model.layers.*.{block}"]
        gone, new = ([b for b in side if b.changed] for side in (picture.before, picture.after))
        assert [b.operator for b in gone] == ["linear"] * members
        assert [b.operator for b in new] == ["linear"]
        kept = [b.operator for b in picture.after if not b.changed and not b.outside]
        assert "linear" in kept  # the projection at the end of the block
    assert len(page[1].of("g", "changed")) >= 2 * (4 + 1 + 3 + 1 + 2 + 1)


def test_what_a_block_reads_is_drawn_also_where_a_fused_call_gives_several_results(make_model: Make) -> None:
    report = fxfuse.explain(make_model(layers=("full_attention",)), target="cuda")
    after = {p.block: p for p in report.graphs[0].pictures}["model.layers.*.mlp"].after
    drawn = {box.name: box for box in after}
    first = next(box for box in after if box.changed)
    assert [drawn[name].operator for name in first.inputs] == ["add_rms_norm"]


def test_modules_without_a_numbered_layer_around_them_are_drawn_before_and_after(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Gated(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x))

    for model, name, block in (
        (Gated(), "x", ""),
        (Named(), "x", "block"),
        (nn.Sequential(Gated(), Gated(), Gated()), "input", "*"),
    ):
        report = fxfuse.explain(model, inputs={name: torch.randn(2, 8)}, inner="eager")
        (picture,) = report.graphs[0].pictures
        assert picture.block == block
        gone, new = ([b.detail for b in side if b.changed] for side in (picture.before, picture.after))
        assert gone == ["gate [2, 16]", "up [2, 16]"] and new == ["gate_up [2, 32]"]
        kept = [b.operator for b in picture.after if not b.changed and not b.outside]
        assert kept == ["silu", "mul", "linear"]
        assert block or "the model itself" in report.to_html(tmp_path / "x.html").read_text(encoding="utf-8")
    assert [row.where for row in report.rows] == ["{0..2}.gate_up"]


@pytest.mark.parametrize(("model", "block"), [(Gated(), ""), (nn.Sequential(Gated(), Gated()), "*")])
def test_a_rewritten_graph_of_ones_own_is_drawn_before_and_after(model: nn.Module, block: str) -> None:
    """Traced without Dynamo, nodes do not say which module they are from; their weights do."""
    (picture,) = fxfuse.rewrite(model, [torch.randn(2, 8)], dynamic=False).report.graphs[0].pictures
    assert (picture.block, picture.phase) == (block, "graph")
    gone, new = ([b.detail for b in side if b.changed] for side in (picture.before, picture.after))
    assert gone == ["gate [2, 16]", "up [2, 16]"] and new == ["gate_up [2, 32]"]
    kept = [b.operator for b in picture.after if not b.changed and not b.outside]
    assert kept == ["silu", "mul", "linear"]


def test_a_tensor_that_gives_a_dtype_alone_is_joined_to_nothing() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gated = Gated()

        def forward(self, x: Tensor) -> Tensor:
            wide = x.relu()
            return self.gated(wide.double().neg().type_as(wide)) + wide.sum()

    report = fxfuse.explain(Norm(), inputs={"x": torch.randn(2, 8)}, inner="eager")
    (picture,) = report.graphs[0].pictures
    for side in (picture.before, picture.after):
        assert {box.inputs for box in side if box.changed} == {("neg",)}


def test_names_from_the_model_cannot_break_the_page(tmp_path: Path) -> None:
    report = fxfuse.explain(Gated(), inputs={"x": torch.randn(2, 8)}, inner="eager")
    report.note("<script>alert('&')</script>")
    text = report.to_html(tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text
    Page(text)


def test_boxes_of_one_row_do_not_overlap_and_lines_go_down() -> None:
    boxes = [
        Box(f"n{i}", "mul" * (i % 7), "", tuple(f"n{j}" for j in (i // 2 - 1, i // 3 - 1) if 0 <= j < i))
        for i in range(40)
    ]
    svg = draw(boxes, "some & graph")
    Page(svg)
    rectangles = re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="(\d+)"', svg)
    found = [(float(x), float(y), float(width)) for x, y, width in rectangles]
    assert len(found) == 40 and len({width for _, _, width in found}) > 2
    for i, (x, y, width) in enumerate(found):
        for other_x, other_y, other_width in found[:i]:
            beside = x + width <= other_x or other_x + other_width <= x
            assert beside or abs(y - other_y) >= HEIGHT
    top = {box.name: y for box, (_, y, _) in zip(boxes, found, strict=True)}
    assert all(top[source] + HEIGHT < top[box.name] for box in boxes for source in box.inputs)
    wide, high = (float(v) for v in re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    assert all(0 <= x <= wide - width and 0 <= y <= high - HEIGHT for x, y, width in found)


def test_no_name_of_an_operator_or_a_projection_is_cut() -> None:
    """In a monospaced font a letter is 0.6 times as wide as the font is high: 12 pixels, and 10 below."""
    boxes = [
        Box("n0", "scaled_dot_product_attention", "[1, 8, 17, 256]", ()),
        Box("n1", "linear", "in_proj_qkv_z_b_a [16, 4096, 12352]", ("n0",)),
        Box("n2", "a" * 80, "b" * 80, ("n1",)),
    ]
    svg = draw(boxes, "graph")
    parts = re.findall(r'width="(\d+)" height="\d+" rx.*?<text[^>]*>(.*?)</text><text[^>]*>(.*?)</text>', svg)
    assert [part[1:] for part in parts[:2]] == [(box.operator, box.detail) for box in boxes[:2]]
    for width, operator, detail in parts:
        assert int(width) <= WIDEST and max(7.23 * len(operator), 6.02 * len(detail)) <= int(width) - 8
    assert parts[2][1].endswith("…") and parts[2][2].endswith("…")


# Speed.


def test_no_speed_is_claimed_that_was_not_measured(make_model: Make, prompt: Tensor, tmp_path: Path) -> None:
    model = make_model(layers=("full_attention",)).optimize(inner="eager")
    with torch.no_grad():
        model(prompt)
    report = model.optimization_report
    for text in (str(report), report.to_html(tmp_path / "a.html").read_text()):
        assert "faster" not in text and "times as fast" not in text
    calls = report.calls
    measured = report.benchmark({"input_ids": prompt}, rounds=3)
    assert measured.rounds == 3 and measured.before_ms > 0 and measured.after_ms > 0
    assert report.calls == calls + 4 and report.measurements == [measured]
    assert str(measured) in re.sub(r"\s+", " ", str(report))
    assert str(measured) in report.to_html(tmp_path / "b.html").read_text()
    assert json.loads(report.to_json())["measurements"][0]["ratio"] == pytest.approx(measured.ratio)


def test_a_slower_call_is_called_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "slower" in str(measure.Measurement(1.0, 2.0, 3)) and "fast" not in str(
        measure.Measurement(1.0, 2.0, 3)
    )
    assert "2.00 times as fast" in str(measure.Measurement(2.0, 1.0, 3))


def test_a_cache_does_not_grow_from_one_measured_call_to_the_next(make_model: Make, prompt: Tensor) -> None:
    model = make_model(layers=("full_attention",)).optimize(inner="eager")
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    model.optimization_report.benchmark({"input_ids": prompt[:, :1], "past_key_values": cache}, rounds=2)
    assert cache.get_seq_length() == prompt.shape[1]


def test_what_cannot_be_measured_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gated()
    report = called(model)
    for unnamed in (torch.randn(1, 8), (torch.randn(1, 8),)):
        with pytest.raises(OptionError, match="by name"):
            report.benchmark(unnamed)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="by name"):
            fxfuse.explain(model, inputs=unnamed)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="rounds=0"):
        report.benchmark({"x": torch.randn(1, 8)}, rounds=0)
    fxfuse.deoptimize(model)
    with pytest.raises(OptionError, match=r"model\.optimize\(\)"):
        report.benchmark({"x": torch.randn(1, 8)})
    with pytest.raises(OptionError, match=r"model\.optimize\(\)"):
        fxfuse.explain(Gated(), inputs={"x": torch.randn(1, 8)}).benchmark({})
    broken = fxfuse.optimize(Gated(), inner="eager")
    found = optimization_report(broken)
    assert found is not None
    monkeypatch.setattr(inner, "compile_graph", lambda *args: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="no compiled graph of Gated ran"):
        found.benchmark({"x": torch.randn(1, 8)})


def test_a_report_can_be_copied_and_written_as_json(make_model: Make) -> None:
    report = fxfuse.explain(make_model(layers=("full_attention",)), inner="eager")
    found = json.loads(report.to_json())
    assert found["graphs"][0].keys() >= {"phase", "nodes_before", "nodes_after", "calls"}
    assert copy.copy(report).rows == report.rows
