"""Which fxfuse has made a compiled graph, for the keys of torch's caches on disk."""

import hashlib
from functools import cache
from pathlib import Path

from fxfuse import passes, patterns
from fxfuse.runtime import ops

PACKAGES = (passes, patterns, ops)


@cache
def source_tag() -> str:
    """A digest of the sources of passes, patterns and operators, their kernels among them.

    A key of torch's names the operators of a graph, and not what stood in its place because of them: what the
    gradient of one was made of, say.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        for folder in map(Path, package.__path__):
            for file in sorted(folder.rglob("*.py")):
                digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return f"fxfuse {digest.hexdigest()}"
