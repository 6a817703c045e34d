"""What is rewritten, and in which order."""

if __name__ != "fxfuse.passes":
    raise ImportError("import this package as fxfuse.passes: a second copy would have a second registry")
