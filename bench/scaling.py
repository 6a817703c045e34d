"""How time grows: per token with layers and batch, per prompt with its length."""

import argparse
from collections.abc import Iterator

from generation import Call, prompt, token_case
from harness import Case, run
from models import DTYPES, build, contenders, model_arguments, title
from prefill import prompt_case


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Decoding for each depth; at the smallest one, each batch and each length of prompt."""
    tiny = options.size == "tiny"
    depths = options.depths or ([2, 4] if tiny else [4, 8, 16, 24])
    batches = options.batches or ([2] if tiny else [2, 4, 8, 16])
    lengths = options.lengths or ([16, 80] if tiny else [64, 256, 1024, 4096])
    for depth in depths:
        eager = build(options, depth)
        compared = contenders(options, eager)
        for batch in [1, *batches] if depth == depths[0] else [1]:
            call = Call(prompt(eager, batch, 16), options.tokens, "StaticCache")
            yield token_case(title(options, eager, f"decode, batch {batch}"), call, compared)
        if depth == depths[0]:
            for length in lengths:
                yield prompt_case(
                    title(options, eager, f"prompt {length}"), prompt(eager, 1, length), compared
                )
        del eager, compared


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__)
    options.add_argument("--depths", type=int, nargs="+", help="layers (default 4, 8, 16 and 24)")
    options.add_argument("--batches", type=int, nargs="+", help="beside 1 (default 2, 4, 8 and 16)")
    options.add_argument("--lengths", type=int, nargs="+", help="of prompts (default 64 to 4096)")
    options.add_argument("--tokens", type=int, default=32, help="tokens decoded in one sample (default 32)")
    return options


def main(argv: list[str] | None = None) -> int:
    return run(
        "growth with layers, batch and prompt", parser(), lambda options: [DTYPES[options.dtype]], cases, argv
    )


if __name__ == "__main__":
    raise SystemExit(main())
