"""Training for PyTorch that fits the memory you have.

`plan`, `estimate`, `TrainingProgram`, `TrainingStep` and `linear_cross_entropy` are for one's own loops. `Task` takes
one's own model and data through memfit's pipeline. Torch is imported when one of them is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfit.chunked_loss import linear_cross_entropy
    from memfit.memory.devices import Device
    from memfit.memory.estimate import Estimate, estimate
    from memfit.memory.in_memory import plan
    from memfit.memory.plan import Plan
    from memfit.recovery import RecoveringStep
    from memfit.step import TrainingProgram, TrainingStep
    from memfit.workloads.custom import Task

__version__ = "0.1.0"
__all__ = [
    "Device", "Estimate", "Plan", "RecoveringStep", "Task", "TrainingProgram", "TrainingStep", "__version__",
    "estimate", "linear_cross_entropy", "plan",
]  # fmt: skip

_ROOMS = {
    "Device": "memfit.memory.devices",
    "Estimate": "memfit.memory.estimate",
    "Plan": "memfit.memory.plan",
    "RecoveringStep": "memfit.recovery",
    "Task": "memfit.workloads.custom",
    "TrainingProgram": "memfit.step",
    "TrainingStep": "memfit.step",
    "estimate": "memfit.memory.estimate",
    "linear_cross_entropy": "memfit.chunked_loss",
    "plan": "memfit.memory.in_memory",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'memfit' has no attribute {name!r}")
