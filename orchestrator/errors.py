"""Every error a user can meet, each with the rule, the value and the remedy in its message.

OrchestratorError
├── ConfigError        the user's file is wrong: `file:line: field: rule (got value)`, all at once
├── DataError          a dataset is missing, empty, or has a row that cannot be used
├── BaseModelError     the base model cannot be loaded
│   └── BaseModelUnreachable  the hub or the disk that has it does not answer, but may later
├── StrategyError      the machine lacks what trial.strategy or the optimizer needs there
├── RunFolderError     the run folder belongs to another sweep, is in use, or is damaged
├── LoadingFailed      no worker can load a base now that was loaded before, or is elsewhere
├── DiskFull           a disk, a quota or a file-size limit is reached; carries the path
├── TrialFailed        reason: not_valid | loss_not_finite | not_trained | out_of_memory |
│                      data_error | worker_lost | raised
├── ClusterError       Ray or Kubernetes said no; carries its words
│   ├── NeverStarted   a submitted sweep did not start, and will not by itself
│   └── ContactLost    the cluster does not answer; what was submitted goes on without us
├── TrackingError      the MLflow tracking server cannot be used
│   └── TrackingUnreachable   it does not answer, but may later
├── ReportError        the report's pictures cannot be drawn
├── ExportRefused      the exported model would differ too much from the adapter, or has no place
└── RegistryError      the model registry said no
    └── RegistryUnreachable   it does not answer, but may later

Instances hold plain strings only, so that they survive pickling on their way through Ray.
"""

import errno
from typing import Self

# What the operating system says when a disk, a quota or a file-size limit is reached.
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
UNREACHABLE_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
)

OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class OrchestratorError(Exception):
    """Base of all errors that end a command with one clear message instead of a traceback."""


class ConfigError(OrchestratorError):
    """Something in the configuration that its author can correct."""


class DataError(OrchestratorError):
    """The dataset cannot be read or used as asked."""


class DataUnreachable(DataError):
    """Data that is elsewhere and cannot be read now, whatever is at fault; another time it may."""


class BaseModelError(OrchestratorError):
    """The base model or its tokenizer cannot be loaded."""


class BaseModelUnreachable(BaseModelError):
    """What has it does not give it now; another time it may."""


class StrategyError(OrchestratorError):
    """The machine cannot do what the strategy or the optimizer asks of it; says what to install."""


class RunFolderError(OrchestratorError):
    """The run folder cannot be used for this sweep."""


class LoadingFailed(OrchestratorError):
    """The trials on a base wait for another start of the sweep; nothing of them is lost."""


class DiskFull(OrchestratorError):
    """Nothing more can be written; what is there is whole."""


class TrialFailed(OrchestratorError):
    """One trial ended without a result; `reason` is one of the words in the module's docstring."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    @classmethod
    def by(cls, error: OrchestratorError) -> Self:
        """The failure of a trial whose own work met this error."""
        if isinstance(error, cls):
            return error
        return cls("raised", f"{type(error).__name__}: {error}")


class ClusterError(OrchestratorError):
    """Ray could not be started, reached, or give the resources asked for."""


class NeverStarted(ClusterError):
    """The cluster refuses the sweep, or cannot start it."""


class ContactLost(ClusterError):
    """The cluster cannot be reached, or does not answer any more."""


class TrackingError(OrchestratorError):
    """The tracking server cannot be reached or refused a call."""


class TrackingUnreachable(TrackingError):
    """The tracking server does not answer now. Training goes on without it."""


class ReportError(OrchestratorError):
    """What the report's pictures need is not installed."""


class ExportRefused(OrchestratorError):
    """An export that the user's bounds do not allow, or that would overwrite something."""


class RegistryError(OrchestratorError):
    """The model registry cannot be reached or refused a call."""


class RegistryUnreachable(RegistryError):
    """It does not answer now, so nothing is known of what it holds."""


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS


def is_unreachable(error: BaseException) -> bool:
    """Of a network, or of a disk that machines share."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in UNREACHABLE_ERRNOS


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's own error, which is not imported here, or another's that says so: the driver, cuBLAS
    and the CPU's allocator have none of their own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
