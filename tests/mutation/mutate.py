# ruff: noqa: E501
"""Faults put into our own code, one line each: the tests named beside each of them have to notice.

    python tests/mutation/mutate.py                    all of them, table in docs/mutation-testing.md
    python tests/mutation/mutate.py --only 3 17        some

A fault is made in a copy of the package that is put before the installed one, so that the checkout stays as
it is.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mutation-testing.md"
SECONDS = 420

PASSES = "tests/passes/"
LIVE = "tests/runtime/test_live_weights.py"
WEIGHTS = PASSES + "weights"
MERGE = PASSES + "test_same_input_linears.py"
CHAINS = PASSES + "test_layout_chains.py"
WRITES = PASSES + "test_storage_writes.py"
NORMAL = PASSES + "test_normalise.py"
STRANGERS = "tests/properties/test_strangers_spellings.py"
UPSTREAM = "tests/upstream/test_graph_rewriting.py"
POINTWISE = PASSES + "test_pointwise_spellings.py"
GUARDS = PASSES + "test_guards.py"
FORMULAS = PASSES + "test_formula_rules.py"
BLOCKS = PASSES + "test_fused_blocks.py"
CONVS = PASSES + "test_depthwise_convs.py"
EXPERTS = PASSES + "test_expert_rows.py"
EMPTY = PASSES + "test_empty_values.py"
ONE_QUERY = PASSES + "test_one_query_attention.py"
RULE = "tests/runtime/ops/test_gated_delta_rule.py"
TRAINED = "tests/properties/test_gradients.py -k passed"
GRADIENTS = "tests/runtime/ops/test_chunk_gated_delta_rule_backward.py"
OUTLINE = "tests/runtime/test_outline.py"
SPEED = "tests/runtime/test_one_row_speed.py"
PLAN = WEIGHTS + "/test_plan.py " + WEIGHTS + "/test_blocks.py"


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `file`, once; `tests` are pytest's arguments."""

    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault("passes/same_input_linears.py", "if writes.is_written(linear) else None", "if False else None", MERGE),
    Fault("passes/same_input_linears.py", "    memory_is_not_its_own,\n    weight_is_written", "    weight_is_written", MERGE),
    Fault("passes/same_input_linears.py", "    weight_is_computed,\n    memory", "    memory", MERGE),
    Fault("passes/same_input_linears.py", "            start = stop\n", "            start = stop - 1\n", MERGE),
    Fault("passes/same_input_linears.py", "if storage_of(linear) in keep_layout:", "if False:", MERGE),
    Fault("passes/same_input_linears.py", "writes.version(source, linear), mode[linear]", "0, mode[linear]", UPSTREAM),
    Fault("passes/same_input_linears.py", "writes.version(source, linear), mode[linear]", "writes.version(source, linear), 0", MERGE),
    Fault("passes/same_input_linears.py", "if reason is None and not seen.isdisjoint(memory):", "if False:", MERGE),
    Fault("passes/same_input_linears.py", "        if obstacle is not None:", "        if False:", MERGE),
    Fault("passes/layout_chains.py", "GUARDS = (memory_is_written, gradients_are_parted)", "GUARDS = (gradients_are_parted,)", CHAINS + " -k left_alone"),
    Fault("passes/layout_chains.py", "COPY_GUARDS = (is_no_permutation, ", "COPY_GUARDS = (", CHAINS),
    Fault("passes/layout_chains.py", "if runs and feature == sum(runs[-1]):", "if runs and feature == sum(runs[-1]) + 1:", CHAINS),
    Fault("passes/layout_chains.py", "start - last[0], 2]", "start - last[0], 3]", CHAINS),
    Fault("passes/numbered_features.py", "or list(value.shape[: len(lead)]) != lead or", "or", GUARDS),
    Fault("passes/numbered_features.py", "and found == second[node]", "", CHAINS + " -k length"),
    Fault("passes/one_row_linears.py", "if bias is not None:", "if False:", PASSES + "test_one_row_linears.py"),
    Fault("passes/one_row_linears.py", "statically_known_true(size == 1) for size in rows", "True for size in rows", PASSES + "test_one_row_linears.py"),
    Fault("passes/one_row_linears.py", "return mode == PLAIN", "return True", PASSES + "test_one_row_linears.py"),
    Fault("passes/storage_writes.py", "alias_info.is_write", "alias_info.is_write and False", WRITES),
    Fault("passes/storage_writes.py", "bisect_left(self._writes", "0 * bisect_left(self._writes", WRITES),
    Fault("passes/storage_writes.py", "        if node.op == \"output\" or _reads_strides(node):", "        if _reads_strides(node):", MERGE),
    Fault("passes/storage_writes.py", "else node.all_input_nodes", "else []", WRITES + " " + MERGE),
    Fault("passes/normalise.py", "(train is False or p == 0)", "(train is True or p == 0)", NORMAL),
    Fault("passes/normalise.py", "if isinstance(source, Node) and _is_the_same(program, node, source):", "if isinstance(source, Node):", NORMAL),
    Fault("passes/idle_calls.py", "        if not writes.is_written(node):\n            node.target = torch.ops.aten.reshape", "        if True:\n            node.target = torch.ops.aten.reshape", NORMAL),
    Fault("passes/kept_dimensions.py", "if equal_sizes(node.meta[\"val\"].shape, sizes):", "if True:", "tests/properties/test_normal_form.py"),
    Fault("passes/normalise.py", "            and not written_by(node)\n", "", NORMAL),
    Fault("passes/idle_calls.py", "type(value) in (int, float) and value == wanted", "type(value) in (int, float)", "tests/properties/test_normal_form.py"),
    Fault("passes/idle_calls.py", "writes.version(source, read) != writes.version(source, output)", "False", NORMAL),
    Fault("passes/idle_calls.py", "user not in writes and (is_list or", "False and (is_list or", NORMAL),
    Fault("passes/linear_spellings.py", "weight = _untransposed(turned)\n        if scaled or weight is None", "weight = _untransposed(turned)\n        if weight is None", "tests/properties/test_normal_form.py"),
    Fault("passes/linear_spellings.py", "len(linear.users) != 1", "False", GUARDS),
    Fault("passes/linear_spellings.py", "if parsed[1] == lead + outer and", "if", "tests/properties/test_normal_form.py"),
    Fault("passes/pipeline.py", "        return program, Outcome(misses=", "        return attempt, Outcome(misses=", PASSES + "test_pipeline.py -k 'not random'"),
    Fault("passes/weights/row_map.py", "sorted(permutation) != list(range(len(permutation)))", "False", WEIGHTS),
    Fault("passes/weights/inverse.py", "if piece.start < reached:", "if False:", WEIGHTS),
    Fault("passes/weights/inverse.py", "            across = window[1]\n", "", WEIGHTS),
    Fault("runtime/live_weights.py", "marks = [t.data_ptr() for t in self._shared(args)]", "marks = [0 for t in self._shared(args)]", LIVE + " -k mended"),
    Fault("runtime/live_weights.py", "found.fits(members) and found.may_overwrite(members)", "found.fits(members)", LIVE),
    Fault("runtime/live_weights.py", "if self.tensor is None or state != self._state:", "if self.tensor is None:", LIVE),
    Fault("runtime/ops/rms_norm.py", "(normed * (1.0 + scale if", "(normed * (scale if", "tests/runtime/ops/test_rms_norm.py"),
    Fault("runtime/ops/rms_norm.py", "features.square().mean(-1, keepdim=True) + eps)", "features.square().mean(-1, keepdim=True))", "tests/runtime/ops/test_rms_norm.py tests/runtime/ops/kernels/test_rms_norm.py"),
    Fault("runtime/ops/gated_delta_rule.py", "(last - decay).exp()", "(last + decay).exp()", RULE),
    Fault("patterns/idioms.py", "_normed * (1.0 + _weight)", "_normed * (2.0 + _weight)", FORMULAS),
    Fault("patterns/idioms.py", "SIGMOID_GATE = _x * sigmoid(_gate)", "SIGMOID_GATE = _x * silu(_gate)", FORMULAS),
    Fault("patterns/idioms.py", "* softplus(Var(", "* sigmoid(Var(", BLOCKS),
    Fault("passes/gdn_gates.py", "(idioms.LOG_DECAY, -idioms.LOG_DECAY)", "(idioms.LOG_DECAY,)", STRANGERS + " -k speed"),
    Fault("passes/judge.py", "env.replace(guard.expr)", "guard.expr", PASSES + "test_judge.py -k together"),
    Fault("passes/known_sizes.py", "    _fold_numbers(program)\n", "", STRANGERS + " -k late"),
    Fault("passes/row_parts.py", " if not is_made_of_numbers(n.args[1])", "", STRANGERS + " -k 'ones and norms'"),
    Fault("passes/attention_inputs.py", "not set(found).isdisjoint(_call_of(n).all_input_nodes), n", "True, n", STRANGERS + " -k tables"),
    Fault("passes/attention_inputs.py", "return pairs or", "return", STRANGERS + " -k pairs"),
    Fault("passes/attention_caches.py", " and value_of(each[0]).dim() == 4", "", STRANGERS + " -k memory"),
    Fault("passes/moved_elements.py", "if str(node.target) not in ops.RESHAPES or not rows:", "if True:", STRANGERS + " -k stacked"),
    Fault("passes/judge.py", "same and _same_along(region, outputs, candidate, given, along)", "same", STRANGERS + " -k few_heads"),
    Fault("patterns/idioms.py", "(total(_x * _x) + _eps)", "(mean(_x * _x) + _eps)", BLOCKS),
    Fault("patterns/matcher.py", "if not items and math.isclose(constant, result, rel_tol=1e-6):", "if not items:", FORMULAS),
    Fault("patterns/matcher.py", "if bound.get(variable.name, node) is node:", "if True:", FORMULAS),
    Fault("patterns/matcher.py", "        if items:\n            return\n", "", GUARDS),
    Fault("passes/formula_rule.py", "same = judge.equal(region, [node], candidate, name)", "same = True", GUARDS),
    Fault("passes/formula_rule.py", "if len(set(nodes)) < len(nodes):", "if False:", GUARDS),
    Fault("passes/idle_calls.py", "(made.dtype, made.device) != (own.dtype, own.device)", "made.device != own.device", PASSES + "test_rounding_in_between.py"),
    Fault("passes/rms_norm.py", "        if found.matches:\n            program.refresh()", "        if False:\n            program.refresh()", PASSES + "test_rounding_in_between.py"),
    Fault("passes/gdn_decode.py", "bias = biases[0] if biases else None", "bias = None", BLOCKS),
    Fault("passes/gdn_decode.py", "mixed.features[:keys]), mixed.taken(mixed.features[keys : 2 * keys])", "mixed.features[keys : 2 * keys]), mixed.taken(mixed.features[:keys])", BLOCKS),
    Fault("passes/gdn_decode.py", "for b, a in permutations(found[sizes.value_heads], 2):", "for a, b in zip(found[sizes.value_heads], found[sizes.value_heads][1:]):", BLOCKS),
    Fault("patterns/readings.py", "isinstance(x, float) and 0 < abs(x) <= LARGEST_EPS", "isinstance(x, float) and abs(x) > LARGEST_EPS", BLOCKS),
    Fault("passes/attention_inputs.py", "(heads, kv_heads, kv_heads, heads)[role]", "(heads, heads, heads, heads)[role]", BLOCKS),
    Fault("passes/attention_inputs.py", "permutations(angles)", "[tuple(angles[::-1])]", BLOCKS),
    Fault("passes/attention_inputs.py", "node.args[1] in (2, -2)", "node.args[1] in (1, -1)", BLOCKS),
    Fault("passes/depthwise_convs.py", "columns, 0, k))", "columns, 0, taps - 1 - k))", CONVS),
    Fault("passes/depthwise_convs.py", "[padding, padding]", "[padding, 0]", CONVS),
    Fault("passes/depthwise_convs.py", "(groups, one, list(stride), list(dilation)) != (channels, 1, [1], [1])", "(groups, one) != (channels, 1)", CONVS),
    Fault("passes/depthwise_convs.py", "or mode[conv] != PLAIN", "or False", CONVS),
    Fault("passes/depthwise_convs.py", "y = call(aten.contiguous.default, y)", "pass", CONVS),
    Fault("passes/one_query_attention.py", "if causal or dropout or not", "if dropout or not", ONE_QUERY),
    Fault("passes/one_query_attention.py", "statically_known_true(q.shape[2] == 1)", "True", ONE_QUERY),
    Fault("passes/one_query_attention.py", "row, scores, -math.inf", "row, scores, 0.0", ONE_QUERY),
    Fault("passes/one_query_attention.py", "if scale != 1:", "if False:", ONE_QUERY),
    Fault("passes/one_query_attention.py", "mode[attention] != PLAIN or", "False or", ONE_QUERY),
    Fault("runtime/ops/gated_delta_rule.py", ".triu_(1)", ".triu_(0)", RULE),
    Fault("runtime/ops/gated_delta_rule.py", "norms[..., :size] * beta", "norms[..., :size]", RULE),
    Fault("runtime/outline.py", " and storage_of(node) == storage_of(node.all_input_nodes[0])", "", OUTLINE),
    Fault("runtime/outline.py", "{value.stride()} {value.storage_offset()} \"", "{value.storage_offset()} \"", OUTLINE),
    Fault("runtime/outline.py", " {node.target} {own} {args}\")", " {node.target} {own}\")", OUTLINE),
    Fault("runtime/live_weights.py", "member.data_ptr() == pointer or alias is None or alias.expired()", "True", LIVE + " -k assigned"),
    Fault("runtime/refusals.py", "        elif not tensor.is_contiguous():", "        elif False:", LIVE + " -k refusals"),
    Fault("runtime/live_weights.py", "if all(tensor is not None for tensor in tensors):", "if True:", LIVE + " -k given_back"),
    Fault("passes/weights/check.py", "elif source.dtype != target.dtype:", "elif False:", PLAN),
    Fault("passes/weights/check.py", "            elif start < reached:", "            elif False:", PLAN),
    Fault("passes/weights/check.py", "if panel.rows != target.rows", "if False", PLAN),
    Fault("passes/weights/check.py", "        if reached < source.rows:", "        if False:", PLAN),
    Fault("passes/weights/plan.py", "if data.get(\"version\") != VERSION:", "if False:", PLAN),
    Fault("passes/weights/transform.py", "block = block.t() if rows.transposed else block", "block = block", PLAN),
    Fault("passes/expert_rows.py", "aten.le.Tensor, offsets", "aten.lt.Tensor, offsets", EXPERTS),
    Fault("passes/expert_rows.py", "mode[grouped] != PLAIN or", "False or", EXPERTS),
    Fault("passes/expert_rows.py", "and is_contiguous(experts.mT)", "", EXPERTS),
    Fault("passes/expert_rows.py", "y = call(aten.where.ScalarOther, call(aten.unsqueeze.default, somebodys, 1), y, 0.0)", "pass", EXPERTS),
    Fault("passes/expert_rows.py", "if writes.is_written(weight) or writes.is_written(source):", "if writes.is_written(weight):", EXPERTS),
    Fault("passes/backward.py", "        return str(node.target) == ops.DETACH or not", "        return not", TRAINED),
    Fault("passes/backward.py", "return self._needed and len(", "return False and len(", TRAINED),
    Fault("passes/judge.py", "        if idle:\n", "        if False:\n", PASSES + "test_judge.py"),
    Fault("passes/judge.py", "ONE_LARGE, MIXED, ONE_LARGE) * 8", "ONE_LARGE)", PASSES + "test_judge.py"),
    Fault("passes/judge.py", "ONE_LARGE, MIXED, ONE_LARGE) * 8", "MIXED, (30.0,), MIXED) * 8", PASSES + "test_judge.py"),
    Fault("passes/judge.py", "if not _all_close(expected, shown(without, others)):", "if each.acts(values, without):", PASSES + "test_judge.py"),
    Fault("passes/judge.py", "elif each.acts(values, without):", "else:", PASSES + "test_judge.py"),
    Fault("passes/recurrent_gated_delta_rule.py", "if not own or not shape[1]:", "if not own:", EMPTY),
    Fault("passes/grouped_delta_rule.py", "and 0 < few < heads and", "and few < heads and", EMPTY),
    Fault("passes/grouped_query_attention.py", "and 0 < shape[1] < heads and", "and shape[1] < heads and", EMPTY),
    Fault("passes/one_query_attention.py", "if any(statically_known_true(size == 0)", "if False and any(statically_known_true(size == 0)", EMPTY),
    Fault("passes/gdn_decode.py", "divmod(channels - heads * dv, 2 * dk) if dk else (0, 0)", "divmod(channels - heads * dv, 2 * dk)", EMPTY),
    Fault("passes/idle_calls.py", "in shown or node in viewed)", "in shown)", NORMAL),
    Fault("passes/gdn_decode.py", "if elements < 1 or out.numel() % elements:", "if False:", BLOCKS),
    Fault("passes/judge.py", "if isinstance(value, (list, tuple)):\n            raise Refused", "if False:\n            raise Refused", PASSES + "test_judge.py"),
    Fault("passes/normalise.py", "or (value is not None and is_contiguous(value))", "", NORMAL),
    Fault("passes/expert_rows.py", "if writes.is_written(weight) or writes.is_written(source):", "if writes.is_written(source):", EXPERTS),
    Fault("passes/pipeline.py", "if turns and", "if False and", NORMAL),
    Fault("passes/normalise.py", "if gradients and writes.is_written(node):", "if False:", NORMAL),
    Fault("passes/kept_dimensions.py", " and len(below.users) == 1:", ":", STRANGERS + " -k dimension_stays"),
    Fault("passes/written_positions.py", "or any(accumulates) or node.kwargs", "or node.kwargs", NORMAL + " -k at_positions"),
    Fault("passes/written_positions.py", "or not equal_sizes([*single, *part.shape], wanted)", "", NORMAL + " -k at_positions"),
    Fault("passes/written_positions.py", "negative, from_end, positions)", "negative, positions, positions)", NORMAL + " -k at_positions"),
    Fault("passes/causal_conv1d.py", "new, reordered=True)", "new)", STRANGERS + " -k leaves_the_graph"),
    Fault("passes/regions.py", "(reordered or order != sorted(order))", "reordered and False", PASSES + "test_output_layout.py"),
    Fault("passes/regions.py", "not restored or dense_order(value) is None", "not restored", PASSES + "test_output_layout.py"),
    Fault("passes/judge.py", "{**sizes, **_together(tuple(equal), tuple(tied), tuple(primes), traced)}", "sizes", PASSES + "test_judge.py -k sizes"),
    Fault("passes/rejoined_parts.py", "or features != tuple(range(width))", "", PASSES + "test_rejoined_parts.py"),
    Fault("passes/backward.py", "return self._needed and writes.is_written(source)", "return False", NORMAL + " -k for_the_backward"),
    Fault("passes/one_row_linears.py", "if why is not None:", "if False:", SPEED),
    Fault("passes/expert_rows.py", "return why is not None", "return False", SPEED),
    Fault("passes/pointwise_spellings.py", "if summed <= set(a) & set(b) and batch and", "if", POINTWISE),
    Fault("passes/pointwise_spellings.py", "if any(writes.version(x, n) != writes.version(x, node) for x in operands for n in calls):", "if False:", POINTWISE),
    Fault("passes/written_positions.py", "or any(steps) or", "or", POINTWISE),
    Fault("passes/chosen_weights.py", "if not judge.equal(", "if False and not judge.equal(", EXPERTS),
    Fault("passes/chosen_weights.py", "if reason is not None:", "if False:", EXPERTS),
    Fault("runtime/one_row_speed.py", "self.ratio > MARGIN", "self.ratio < MARGIN", SPEED),
    Fault("runtime/one_row_speed.py", "if found[\"key\"] == key else None", "", SPEED),
    Fault("runtime/one_row_speed.py", "        \"threads\": case.threads,\n", "", SPEED),
    Fault("runtime/one_row_speed.py", " and each.name not in by_name]", "]", SPEED),
    Fault("runtime/one_row_speed.py", "            whole.replace(path)\n", "", SPEED),
    Fault("runtime/backend.py", "if on_cpu and not session.dry_run:", "if on_cpu:", SPEED),
    Fault("runtime/backend.py", "for m in outcome.misses if not m.chosen]", "for m in outcome.misses]", SPEED),
    Fault("runtime/ops/gated_delta_rule.py", "torch.neg(below, ", "torch.abs(below, ", RULE),
    Fault("runtime/ops/chunk_gated_delta_rule_backward.py", ".diagonal(dim1=-2, dim2=-1).zero_()", "", GRADIENTS),
    Fault("runtime/ops/chunk_gated_delta_rule_backward.py", "beta.abs() < LEAST_RATE", "beta.abs() < 0", GRADIENTS),
    Fault("passes/depthwise_convs.py", "if after and storage_of(after[-1]) in shows:", "if False:", CONVS),
    Fault("passes/depthwise_convs.py", "others[0] = tokens", "pass", CONVS),
    Fault("runtime/capture.py", "constants = _constants(graph_module)", "constants: dict[str, Any] = {}", "tests/runtime/test_guarded_addresses.py"),
    Fault("runtime/outline.py", "if own and small:", "if small:", "tests/runtime/test_guarded_addresses.py"),
)  # fmt: skip


def run(fault: Fault) -> tuple[str, str]:
    """Whether the tests notice a fault, "noticed", "missed" or "not found" where the line is not there once, and
    the test that did."""
    text = (ROOT / fault.file).read_text()
    if text.count(fault.old) != 1:
        return "not found", ""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "fxfuse"
        shutil.copytree(ROOT / "src" / "fxfuse", package)
        for name in ("passes", "patterns", "runtime"):
            shutil.copytree(ROOT / name, package / name)
        (package / fault.file).write_text(text.replace(fault.old, fault.new))
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -m 'not slow and not inductor' {fault.tests}"
        environment = os.environ | {
            "PYTHONPATH": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        try:
            found = subprocess.run(
                command,
                shell=True,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return "out of time", ""
    last = next((line for line in found.stdout.splitlines() if line.startswith("FAILED")), "")
    by = last.removeprefix("FAILED ").split(" - ")[0].replace("::", " ")
    return {0: "missed", 1: "noticed"}.get(found.returncode, f"pytest exit {found.returncode}"), by


def _spelled(text: str) -> str:
    return "`" + " ".join(text.split()).replace("|", "/") + "`" if text.strip() else "nothing"


def _key(fault: Fault) -> tuple[str, str, str]:
    return fault.file, _spelled(fault.old), _spelled(fault.new)


def known() -> dict[tuple[str, str, str], tuple[str, str]]:
    """What the page says of each fault: a row whose fault has changed since says nothing."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {(row[1], row[2], row[3]): (row[4], row[5] if len(row) > 5 else "") for row in rows[1:]}


def page(found: dict[tuple[str, str, str], tuple[str, str]]) -> str:
    results = [found.get(_key(fault), ("not run", "")) for fault in FAULTS]
    states = [state for state, _ in results]
    lines = [
        "# Faults put into our own code",
        "",
        "`python tests/mutation/mutate.py` puts one fault at a time into a copy of the package and runs the tests that",
        "should notice.",
        "",
        f"{len(FAULTS)} faults: "
        + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        + ".",
        "",
        "| # | file | instead of | there is | state | noticed by |",
        "|---|---|---|---|---|---|",
        *(
            f"| {number} | {' | '.join(_key(fault))} | {state} | {by} |"
            for number, (fault, (state, by)) in enumerate(zip(FAULTS, results, strict=True))
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    chosen = arguments.only if arguments.only is not None else range(len(FAULTS))
    faults, states = [FAULTS[number] for number in chosen], []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for number, fault, (state, by) in zip(chosen, faults, pool.map(run, faults), strict=True):
            print(f"{number}: {state} {by}", flush=True)
            states.append(state)
            PAGE.write_text(page(known() | {_key(fault): (state, by)}))
    return int(any(state != "noticed" for state in states))


if __name__ == "__main__":
    sys.exit(main())
