"""When a task is worth another try."""

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from memfit.errors import ChildError

RETRIES: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [2, 20]}
"""A child that dies is started again twice; a stage then goes on from its last checkpoint."""


def child_died(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Tell whether a task failed because its child died, of memory or otherwise.

    What is wrong with a config, the data, a budget or a run directory is still wrong a minute later.
    """
    return isinstance(state.data, ChildError)
