"""What a config may say of a user's own workload, which it names by import path; no line of it runs in this process."""

import importlib.machinery
import os
import sys
from pathlib import Path
from typing import Any, Unpack

from pydantic import ConfigDict

from memfit.data.store import built
from memfit.errors import ConfigError
from memfit.files import fingerprint, sha256_file
from memfit.parts import ModelPart, Part
from memfit.process import run_child
from memfit.workloads.kind import How, Kind


class Settings(Part):
    """Settings that are handed over as they are."""

    model_config = ConfigDict(extra="allow")


class Model(ModelPart):
    """Settings of the user's model, handed over as they are, and those of its variants."""

    model_config = ConfigDict(extra="allow")

    def all_variants(self) -> dict[str, dict[str, Any]]:
        """Return every variant's settings, the model's own first, as `own`."""
        own = dict(self.model_extra or {})
        return {"own": own, **{name: {**own, **changes} for name, changes in self.variants.items()}}


class CustomKind(Kind):
    """A workload that a user's module builds: `workload = "package.module:build"`."""

    data, model, loss = Settings, Model, Settings
    monitors = None

    def __init__(self, place: str) -> None:
        self.place = place

    def fingerprint(self, data: Settings, model: Model, code_version: str) -> str:  # noqa: ARG002
        """Name what the user's module makes of the settings: by its place, its code and them. Raises: ConfigError."""
        told = {"place": self.place, "data": data.model_extra, "code": code_version}
        return fingerprint({**told, "files": _hashes(self.place)})

    def prepare(self, data: Settings, model: Model, store: Path, **how: Unpack[How]) -> Path:
        """Let the module's `prepare(data, directory)`, if it has one, fill a directory; it runs in a child."""
        name, settings = self.fingerprint(data, model, how["code_version"]), data.model_extra or {}

        def build(empty: Path) -> dict[str, Any]:
            how["on_progress"]("preparing", 0.0)
            job = {"place": self.place, "data": settings, "directory": str(empty.resolve())}
            log = store / "logs" / f"{name}.log"
            run_child("memfit.workloads.custom:prepare", job, log=log).unwrap(f"preparing {self.place}")
            return {"workload": self.place, "data": settings}

        return built(store, name, build, fresh=how["fresh"])

    def outline(self, data: Settings, model: Model, directory: Path) -> bool:  # noqa: ARG002
        """Only the user's module knows what its data look like."""
        return False


def _hashes(place: str) -> dict[str, str]:
    """Hash the source of a module, and of all else in its package. Raises: ConfigError where it is not found."""
    package, *rest = place.split(":")[0].split(".")
    paths = [str(Path.cwd()), *sys.path]
    found = importlib.machinery.PathFinder.find_spec(package, paths)
    for depth in range(len(rest)):
        within = list(found.submodule_search_locations or ()) if found is not None else []
        found = importlib.machinery.PathFinder.find_spec(".".join([package, *rest[: depth + 1]]), within)
    if found is None or found.origin is None:
        raise ConfigError(
            f"workload: expected a module that Python finds, got {place!r}. Start memfit in the folder that holds "
            f"{package}, or install it."
        )
    origin = Path(found.origin)
    root = origin.parents[len(rest) - 1] if rest else origin
    files = sorted(root.rglob("*.py")) if rest else [origin]
    return {os.path.relpath(file, root): sha256_file(file) for file in files}
