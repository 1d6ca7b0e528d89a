"""The exception tree. Every error says what, expected, got, and what to do next.

MemfitError                     exit status 1
├── ConfigError                 2   the config, an override or an argument is wrong
├── DataError                   3   the data is missing, malformed or too short
├── DoesNotFitError             4   no allowed plan fits the budget
├── RunStateError               5   run directory locked, of another config, or incomplete
├── CheckpointError             6   a checkpoint is torn, corrupt or foreign
├── ExportError                 7   the ONNX file fails a check or differs from torch
├── ChildError                  8   a child process failed in a way that is none of the above
│   └── ChildOutOfMemoryError   9   it ran out of its memory budget
└── Resumable                   75  stopped on request with a checkpoint written; resume to go on
"""


class MemfitError(Exception):
    """Base of every error that memfit raises on purpose."""

    exit_status = 1


class ConfigError(MemfitError, ValueError):
    """Say which setting is wrong, what was expected, what was got."""

    exit_status = 2


class DataError(MemfitError, ValueError):
    """Say which source, row or column is wrong and which policy would accept it."""

    exit_status = 3


class DoesNotFitError(MemfitError):
    """Say which phase needs how many bytes more than the budget, and the cheapest cure."""

    exit_status = 4


class RunStateError(MemfitError):
    """Say which run directory is in the way, who owns it, and what to do."""

    exit_status = 5


class CheckpointError(MemfitError):
    """Say which file of which checkpoint is unusable, and why."""

    exit_status = 6


class ExportError(MemfitError):
    """Say which check of the exported model failed, by how much."""

    exit_status = 7


class ChildError(MemfitError):
    """Say how the child process ended, and where its log is."""

    exit_status = 8


class ChildOutOfMemoryError(ChildError):
    """Say that a child needed more than its budget, and in which phase."""

    exit_status = 9


class Resumable(MemfitError):  # noqa: N818  (a status, not a fault)
    """Say that the run stopped on request after a checkpoint, and how to go on."""

    exit_status = 75
