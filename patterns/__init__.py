"""What a thing looks like: pure data that names ops by string."""

if __name__ != "fxfuse.patterns":
    raise ImportError("import this package as fxfuse.patterns: a second copy would have a second registry")
