"""Time per decoded token through `model.generate()`, with both kinds of cache.

A sample is one call of `generate` on a short prompt; its time per token runs from the first new token to the
last, so that the prompt and what happens once are left out.
"""

import argparse
from collections.abc import Iterator

from generation import CACHES, Call, prompt, token_case
from harness import Case, run
from models import DTYPES, build, contenders, model_arguments, title


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One case for each kind of cache."""
    eager = build(options)
    compared = contenders(options, eager)
    ids = prompt(eager, options.batch, options.prompt)
    for cache in options.cache:
        name = title(options, eager, f"batch {options.batch}", cache)
        yield token_case(name, Call(ids, options.tokens, cache), compared)


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__)
    options.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default 16)")
    options.add_argument("--tokens", type=int, default=32, help="tokens decoded in one sample (default 32)")
    options.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES), help="default both")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("time per decoded token", parser(), lambda options: [DTYPES[options.dtype]], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
