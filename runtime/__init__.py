"""How a rewritten graph runs, and who calls it."""

if __name__ != "fxfuse.runtime":
    raise ImportError("import this package as fxfuse.runtime: a second copy would have a second registry")
