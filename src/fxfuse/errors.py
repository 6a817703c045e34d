"""The exceptions of fxfuse. Each message names the tensor, module or node, and what to do next."""


class FxfuseError(Exception):
    """Base of every exception that fxfuse raises on purpose."""


class UnsupportedModelError(FxfuseError):
    """The model has nothing that the selected passes can rewrite, or a strict run met a miss."""


class CheckpointError(FxfuseError):
    """A checkpoint file is missing, damaged, or disagrees with its index or config."""


class PlanError(FxfuseError):
    """A weight transform is impossible as asked, or does not fit the tensors it was given."""


class VerificationError(FxfuseError):
    """A rewritten computation did not reproduce the original one."""


class OptionError(FxfuseError, ValueError):
    """An option or pass name is unknown, or its value is not allowed."""


class ShapeError(FxfuseError, ValueError):
    """An operator was given tensors whose shapes or dtypes do not fit each other."""


def in_one_line(error: BaseException) -> str:
    """Type and first line of an exception; of torch's, the others are the code that was being traced."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def raised_on_purpose(error: BaseException | None) -> FxfuseError | None:
    """The exception of ours that another (such as Dynamo's) was raised around, if there is one."""
    while error is not None and not isinstance(error, FxfuseError):
        inner = getattr(error, "inner_exception", None)
        error = inner if inner is not None else error.__cause__
    return error
