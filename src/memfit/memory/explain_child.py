"""The child's side of explaining: become a user's script, follow what it holds, report when memory runs out."""

import importlib
import json
import linecache
import os
import sys
import sysconfig
import traceback
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from memfit.errors import MemfitError
from memfit.memory import budget, enforcement
from memfit.memory.explain import JOB_VARIABLE
from memfit.memory.held import Tracker, failed_device, full_forward, lift_limit, lifted_limit, requested_bytes
from memfit.process import die_with_parent, is_out_of_memory

_NOT_THE_USERS = tuple(
    os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


class _Pipe:
    """Where events go; a forked worker of the script sends none."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor, self._process = descriptor, os.getpid()

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        with suppress(BrokenPipeError):
            while line and os.getpid() == self._process:
                line = line[os.write(self._descriptor, line) :]


class _Script:
    """The script that this process becomes."""

    def __init__(self, job: dict[str, Any], emit: _Pipe) -> None:
        self._path, self._args, self._device = job["script"], job["args"], job["device"]
        self._emit = emit
        self._limit: int | None = None
        self._left_out = 0
        self._tracker = Tracker(lambda snapshot: emit("peak", snapshot), self._around)

    def enforce(self, text: str | None) -> None:
        """Check the device; resolve and enforce the budget, if there is one."""
        budget.check_device(self._device)
        if text is None:
            return
        self._limit = budget.resolve_budget(text, self._device)
        self._left_out = enforcement.enforce_budget(self._limit, self._device)
        self._emit("limits", {"budget_bytes": self._limit})

    def _around(self, device: str) -> dict[str, Any]:
        """Measure what the process holds and may hold on a device, tensors or not; and what was called last.

        process_bytes: on a CPU what the budget's limit counts, or resident memory; on CUDA what the allocator reserves.
        """
        kind = torch.device(device).type
        limit = self._limit if kind == torch.device(self._device).type else None
        if kind == "cpu":
            status = enforcement.process_status()
            process = status["VmRSS"] if limit is None else status["VmData"] + self._left_out
            capacity = limit or budget.device_memory("cpu").free_bytes + status["VmRSS"]
        else:
            process = enforcement.now_bytes(device)
            free, total = torch.cuda.mem_get_info(device)
            capacity = process + free if limit is None else limit - max(total - free - process, 0)
        call = self._tracker.call
        return {
            "process_bytes": process,
            "capacity_bytes": capacity,
            "peak_bytes": self._tracker.peak_bytes.get(device, 0),
            "batch_size": call.batch_size if call else None,
            "batch_bytes": call.batch_bytes if call else None,
        }

    def run(self) -> None:
        """Be the script; whatever it raises is raised again after a report."""
        main = types.ModuleType("__main__")
        main.__dict__.update(__file__=self._path, __builtins__=__builtins__, __cached__=None)
        sys.modules["__main__"], sys.argv = main, [self._path, *self._args]
        sys.path.insert(0, str(Path(self._path).resolve().parent))
        code = compile(Path(self._path).read_bytes(), self._path, "exec", dont_inherit=True)
        try:
            with self._tracker:
                exec(code, main.__dict__)  # noqa: S102  (what `python SCRIPT` does)
        except BaseException as error:
            _hide_own_frames(self._path)
            failure = None if isinstance(error, SystemExit) else _out_of_memory_within(error)
            if failure is not None:
                self._explain(failure)
            raise
        finally:
            self._emit("ended", {"times_out_of_memory": self._tracker.times_out, "peaks": self._tracker.peak_bytes})

    def _explain(self, error: BaseException) -> None:
        with lifted_limit():
            message, snapshot = self._tracker.ran_out or ("", None)
            if snapshot is None or message not in str(error):  # no operator of torch ran out, but numpy, or a worker
                snapshot = self._tracker.snapshot(failed_device(error), thorough=True)
            found = {
                "message": str(error)[:2000],
                "request_bytes": requested_bytes(str(error)),
                "source": _source(error, self._path),
                "full_forward": full_forward(self._tracker.call),
            }
            self._emit("oom", {**snapshot, **found})
        lift_limit()  # the script's own traceback has to be printed


def _out_of_memory_within(error: BaseException) -> BaseException | None:
    """Find the error that meant that memory ran out: this one, or one that it was raised from or while handling."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if is_out_of_memory(found):
            return found
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return None


def _source(error: BaseException, script: str) -> dict[str, Any] | None:
    """Find the innermost line of the user's own code."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = frame.f_code.co_filename
        if path == script or _is_the_users(os.path.realpath(path)):
            text = linecache.getline(path, line).strip()
            return {"file": path, "line": line, "function": frame.f_code.co_name, "code": text}
    return None


def _is_the_users(path: str) -> bool:
    return Path(path).is_file() and not path.startswith((*_NOT_THE_USERS, _own_folder()))


def _own_folder() -> str:
    return str(Path(__file__).resolve().parent.parent) + os.sep


def _hide_own_frames(script: str) -> None:
    """Have tracebacks begin with the script, as if Python had started it."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        begin = trace
        while begin is not None and begin.tb_frame.f_code.co_filename != script:
            begin = begin.tb_next
        show(kind, error.with_traceback(begin or trace), begin or trace)

    sys.excepthook = hook


def main() -> None:
    """Be the child."""
    job = json.loads(os.environ.pop(JOB_VARIABLE))
    die_with_parent(job["parent"])
    emit = _Pipe(job["descriptor"])
    script = _Script(job, emit)
    try:
        script.enforce(job["budget"])
    except MemfitError as error:
        emit("error", {"kind": type(error).__name__, "message": str(error)})
        sys.exit(error.exit_status)
    script.run()


if __name__ == "__main__":
    # The module's one importable instance, as `__main__` is about to be the script.
    importlib.import_module("memfit.memory.explain_child").main()
