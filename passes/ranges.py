"""Numbers of layers, in few letters."""

from collections.abc import Iterable

# Runs of numbers that are spelled out where they are many; of more, the first two and the last.
MOST = 4


def ranges(numbers: Iterable[int], shortened: bool = False) -> str:
    """[0, 1, 2, 4] as "{0..2,4}", a single number without braces; "{0..2,4..6,…,20..22}" where shortened."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    if shortened and len(spans) > MOST:
        spans = [*spans[:2], "…", spans[-1]]
    text = ",".join(spans)
    return f"{{{text}}}" if len(spans) > 1 or ".." in text else text
