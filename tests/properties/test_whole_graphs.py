"""Random programs of several blocks, rewritten as a whole."""

import pytest
from whole_graphs import ALL, FUSING, passes_of, program_of, run

from fxfuse.testing.programs import RandomProgram


def test_a_sample_of_programs_holds() -> None:
    """Of matrices and moved data, and of any blocks under all passes."""
    seeds = range(8)
    assert {passes_of(seed) for seed in seeds} == {ALL, FUSING}
    tally = run(seeds)
    assert tally.wrong == [], "\n".join(tally.wrong)
    assert tally.matched["same_input_linears"] > 2 and tally.matched["layout_chains"] > 1
    assert len(tally.matched) > 4


def test_without_passes_nothing_is_matched() -> None:
    assert run(range(1, 3), passes=()).matched.total() == 0


def test_programs_share_weights_and_write_in_place() -> None:
    programs = [program_of(seed) for seed in range(80) if passes_of(seed) == FUSING]
    assert sum("add_(" in p.module.code or "mul_(" in p.module.code for p in programs) > 10
    assert any(len(p.blocks) > len({n.split("_")[0] for n in _owners(p)}) for p in programs)


def _owners(program: RandomProgram) -> set[str]:
    names = {name for name, _ in program.module.named_parameters()}
    return {name for name in names if not name.startswith("glue")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_programs_hold() -> None:
    tally = run(range(1000, 1200))
    assert tally.wrong == [], "\n".join(tally.wrong)
