"""What the pipeline's own process knows of a kind of problem, without torch: children compute, the parent decides."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypedDict, Unpack

from memfit.parts import ModelPart, Part


class How(TypedDict):
    """How data are prepared."""

    code_version: str
    """Hash of the code that prepares them."""
    fresh: bool
    """Anew, even where they are there."""
    on_progress: Callable[[str, float], None]
    """Told what is being done, and the share that is."""


class Kind(ABC):
    """The settings that a workload takes, and how its data are prepared."""

    data: ClassVar[type[Part]]
    """The config's table `data`."""
    model: ClassVar[type[ModelPart]]
    """Its table `model`."""
    loss: ClassVar[type[Part]]
    """The table `loss` of a stage."""
    monitors: ClassVar[tuple[str, ...] | None]
    """What a stage may monitor: loss terms, their total, and metrics; None: whatever the workload measures."""

    @abstractmethod
    def fingerprint(self, data: Any, model: Any, code_version: str) -> str:
        """Name the prepared data: a hash of sources, settings and code."""

    @abstractmethod
    def prepare(self, data: Any, model: Any, store: Path, **how: Unpack[How]) -> Path:
        """Prepare the data in `store`, under their fingerprint, or find them there; return their directory."""

    @abstractmethod
    def outline(self, data: Any, model: Any, directory: Path) -> bool:
        """Write made-up data of the same shapes: enough to tell what cannot fit before anything is prepared.

        Returns whether it could.
        """

    def follow(self, before: Any, changes: Mapping[str, Any]) -> ModelPart:  # noqa: ARG002  (other kinds look at it)
        """Return the model of a stage that changes some settings of the one before, whose weights it takes over.

        Raises: ValueError where the weights cannot be carried over.
        """
        raise ValueError("expected none; this workload's model cannot change between stages")

    def sources_fingerprint(self, model: Any) -> str:  # noqa: ARG002
        """Name what a model is built from besides its settings, such as files of weights; empty for nothing."""
        return ""

    def min_micro_batch_size(self, model: Any) -> int:  # noqa: ARG002  (other kinds look at it)
        """Return the fewest samples that the loss or the batch statistics make sense of."""
        return 1
