"""`python -m fxfuse` is the `fxfuse` command."""

from fxfuse.cli import app

if __name__ == "__main__":
    app(prog_name="fxfuse")
