"""Training for PyTorch that fits the memory you have.

`TrainingProgram` and `TrainingStep` are here for one's own loops; torch is imported when one of them is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfit.step import TrainingProgram, TrainingStep

__version__ = "0.1.0"
__all__ = ["TrainingProgram", "TrainingStep", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("TrainingProgram", "TrainingStep"):
        from memfit import step

        return getattr(step, name)
    raise AttributeError(f"module 'memfit' has no attribute {name!r}")
