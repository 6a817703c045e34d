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
