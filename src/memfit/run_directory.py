"""One run, one directory: its lock, its record of steps, and reuse of what earlier runs did."""

import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memfit.errors import RunStateError
from memfit.files import read_json, sha256_file, write_json
from memfit.locks import locked

RECORD = "run.json"


def new_run_id() -> str:
    """Name a run by its start (UTC, milliseconds) and process, so that names sort by time and never collide."""
    now = time.time()
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}-{os.getpid()}"


@dataclass(frozen=True)
class Found:
    """A finished step of an earlier run whose inputs, config and code were the same."""

    run_dir: Path
    run_id: str


class RunDirectory:
    """A run's files. The record in run.json says which step did what, and survives a kill at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = _read_record(path) if (path / RECORD).exists() else {}
        """Empty where there is none yet, and where what is there was torn: the steps' outputs speak for themselves."""

    @classmethod
    def create(cls, path: Path, name: str, facts: dict[str, Any]) -> "RunDirectory":
        """Make the directory of a new run and write its first record."""
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        run.record = {
            "schema": 1,
            "run_id": path.name,
            "name": name,
            "created": now,
            "finished": None,
            **facts,
            "steps": [],
        }
        run.save()
        return run

    @property
    def run_id(self) -> str:
        """Return the run's id."""
        return str(self.record["run_id"])

    def save(self) -> None:
        """Write the record."""
        write_json(self.path / RECORD, self.record)

    def step(self, name: str) -> dict[str, Any] | None:
        """Return the record of a step, if it was begun."""
        return next((step for step in self.record["steps"] if step["name"] == name), None)

    def note(
        self,
        name: str,
        fingerprint: str,
        status: str,
        *,
        from_run: str | None = None,
        seconds: float = 0.0,
        outputs: Sequence[str] = (),
    ) -> None:
        """Write down where a step stands: running, ran or reused; `outputs` are the files or folders that it made."""
        entry = {"name": name, "fingerprint": fingerprint, "status": status, "from_run": from_run, "seconds": seconds}
        self.record.setdefault("outputs", {})[name] = _describe(self.path, outputs)
        steps = [step for step in self.record["steps"] if step["name"] != name]
        self.record["steps"] = [*steps, entry]
        self.save()

    def done(self, name: str, fingerprint: str) -> bool:
        """Tell whether this run finished a step with this fingerprint, and what it made is still as it was."""
        step, outputs = self.step(name), self.record.get("outputs", {}).get(name, {})
        finished = step is not None and step["fingerprint"] == fingerprint and step["status"] in ("ran", "reused")
        return finished and outputs == _describe(self.path, outputs)

    def find_earlier(self, name: str, fingerprint: str, outputs: list[str]) -> Found | None:
        """Find the newest other run beside this one that finished the step, its outputs still there."""
        for folder in sorted(self.path.resolve().parent.iterdir(), reverse=True):
            if folder.name == self.path.resolve().name:
                continue
            try:
                other = RunDirectory(folder)
                finished = other.done(name, fingerprint) and all((folder / output).exists() for output in outputs)
            except (RunStateError, KeyError, OSError):  # it is not a run, or not ours to read
                continue
            if finished:
                origin = (other.step(name) or {}).get("from_run") or other.run_id
                return Found(folder, origin)
        return None

    def take(self, found: Found, outputs: list[str]) -> None:
        """Take over an earlier run's outputs by hard link, or by copy where links cannot be made."""
        for output in outputs:
            source, target = found.run_dir / output, self.path / output
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target, symlinks=True, copy_function=_link)
            else:
                target.unlink(missing_ok=True)
                _link(str(source), str(target))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Own the directory while the block runs. Raises: RunStateError that names the owner."""
        with locked(self.path / ".lock", str(self.path), self.path, "Wait for it, or take another --run-dir."):
            yield


def _describe(folder: Path, outputs: Iterable[str]) -> dict[str, Any]:
    """Return size and hash of every file of the outputs; of checkpoints, which hold hashes of their own, the size."""
    found: dict[str, Any] = {}
    for output in outputs:
        path = folder / output
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                name = str(file.relative_to(folder))
                found[name] = [file.stat().st_size, None if "/checkpoints/" in name else sha256_file(file)]
    return found


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path / RECORD)
    except ValueError as error:
        if (path / "config.toml").exists():
            return {}  # torn: begin a new one
        raise RunStateError(f"{path / RECORD}: not JSON ({error}). Take another --run-dir.") from error
    if not isinstance(record, dict) or not isinstance(record.get("steps"), list):
        raise RunStateError(
            f"{path / RECORD}: expected the record of a run, got something else. Take another --run-dir."
        )
    return record


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def unfinished(runs: Path, config_text: str) -> Path | None:
    """Find the newest run of a name that did not finish and has the same resolved config."""
    if not runs.exists():
        return None
    for folder in sorted(runs.iterdir(), reverse=True):
        try:
            if (folder / "config.toml").read_text(encoding="utf-8") == config_text:
                return None if _read_record(folder).get("finished") else folder
        except (OSError, UnicodeDecodeError, RunStateError):  # not a run, or one that never began
            continue
    return None


def environment() -> dict[str, Any]:
    """Describe the machine and the libraries, without importing them."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_threads": os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
