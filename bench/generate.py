"""Whole calls of `model.generate()`: time to the first token (TTFT), time per output token, tokens/s.

With the defaults of `generate` (a DynamicCache) and with a static cache, for several batch sizes. A sample is
one call, timed from the call to the last token; the other figures are medians over the same calls.
"""

import argparse
from collections.abc import Iterator

from generation import CACHES, Call, call_case, prompt
from harness import Case, run
from models import DTYPES, build, contenders, model_arguments, title


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One case for each kind of cache and each batch."""
    eager = build(options)
    compared = contenders(options, eager)
    for cache in options.cache:
        for batch in options.batches or ([1, 2] if options.size == "tiny" else [1, 4, 16]):
            call = Call(prompt(eager, batch, options.prompt), options.tokens, cache)
            yield call_case(title(options, eager, f"batch {batch}", cache), call, compared)


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__)
    options.add_argument("--batches", type=int, nargs="+", help="default 1, 4 and 16")
    options.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    options.add_argument("--tokens", type=int, default=32, help="new tokens of one call (default 32)")
    options.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES), help="default both")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("whole calls of generate()", parser(), lambda options: [DTYPES[options.dtype]], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
