"""The errors a user can meet, each with the exit code the command ends with.

Not here: failures inside PyTorch or NCCL; the launcher turns those into `RankLostError`.
"""

__all__ = [
    "ConfigError",
    "DoesNotFitError",
    "IncompatibleError",
    "IntegrityError",
    "InternalError",
    "OutputClosedError",
    "ParityError",
    "PreflightError",
    "RankLostError",
    "ShardlineError",
    "StalledError",
    "UnsupportedSegmentError",
]


class ShardlineError(Exception):
    """One clear line for the user: what was given, what is allowed, what to change."""

    exit_code = 1
    rank: str | None = None
    """Which rank of a job raised it; None: it was found before there were ranks."""


class ConfigError(ShardlineError, ValueError):
    """Bad usage, configuration or request."""

    exit_code = 2


class PreflightError(ShardlineError):
    """This host or container lacks something that the job needs."""

    exit_code = 3


class IntegrityError(ShardlineError, ValueError):
    """A file is absent, truncated, corrupt or holds a tensor of the wrong shape."""

    exit_code = 4


class IncompatibleError(ShardlineError):
    """A bundle, or a file of it, was made for another GPU, rank or version."""

    exit_code = 5


class UnsupportedSegmentError(ConfigError):
    """A backend that was asked for by name cannot compile a part of the model."""


class DoesNotFitError(ShardlineError):
    """The model, its KV cache or its activations do not fit into the memory given."""

    exit_code = 6


class ParityError(ShardlineError):
    """A compiled model does not compute what the model computes."""

    exit_code = 7


class InternalError(ShardlineError):
    """A defect of shardline itself."""


class OutputClosedError(ShardlineError):
    """Whoever read the output has gone; the exit code is that of a program ended by SIGPIPE."""

    exit_code = 141


class RankLostError(ShardlineError):
    """A rank died, raised, or could not be reached.

    Attributes:
        peer: this rank is well, it lost another one.
    """

    exit_code = 8

    def __init__(self, message: str, *, peer: bool = False) -> None:
        super().__init__(message)
        self.peer = peer


class StalledError(RankLostError):
    """A rank did not answer in time; this one is well."""

    exit_code = 9

    def __init__(self, message: str) -> None:
        super().__init__(message, peer=True)
