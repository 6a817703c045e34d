"""What each pass adds: time per token and per prompt with all passes, and with all but one.

Ours without a pass is the baseline of ours with all of them, so that each ratio is what that pass is worth
where the others are there. `no passes` is the same path with nothing rewritten. A pass that finds nothing in
the model has no case: what came out would be noise.
"""

import argparse
from collections.abc import Iterator

from generation import Call, prompt, token_case
from harness import Case, run
from models import DTYPES, Contender, build, model_arguments, optimized, title
from prefill import prompt_case

import fxfuse
from fxfuse.passes.pipeline import selected


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """For each pass that rewrites something here, one case of decoding and one of a prompt."""
    eager = build(options)
    reference, ours = Contender("eager", eager), optimized(options, eager)
    target = options.device.partition(":")[0]
    graphs = fxfuse.explain(eager, inner=options.inner, target=target).graphs
    matching = {name for g in graphs for name, outcome in g.outcomes.items() if outcome.matches}
    names = [each.name for each in selected("default", options.inner, target) if each.name in matching]
    call = Call(prompt(eager, options.batch, 16), options.tokens, "StaticCache")
    ids = prompt(eager, options.batch, options.prompt)
    one_by_one = names if options.only is None else [name for name in names if name in options.only]
    for left_out in [names, *([name] for name in one_by_one if names != [name])]:
        kept = [name for name in names if name not in left_out]
        label = f"without {left_out[0]}" if kept else "no passes"
        compared = [reference, optimized(options, eager, label, kept, matching=False), ours]
        pair = {"baselines": (label,)}
        yield token_case(title(options, eager, "decode", label), call, compared, **pair)
        yield prompt_case(title(options, eager, f"prompt {options.prompt}", label), ids, compared, **pair)
        del compared


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__)
    options.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    options.add_argument("--tokens", type=int, default=32, help="tokens decoded in one sample (default 32)")
    options.add_argument("--only", nargs="+", metavar="PASS", help="leave out only these, one at a time")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("what each pass adds", parser(), lambda options: [DTYPES[options.dtype]], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
