"""A run of its own process, in a memory group of the kernel's: what test_kernel_limits.py starts.

python limited_run.py CONFIG FOLDER GROUP_FILE LIMIT_BYTES WATCHING: the limit is set once training has begun, or, where
WATCHING is "no", before it, with a child that never looks at the memory at hand. Events go to stdout.
"""

import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from memfit import pipeline as pipelines
from memfit.config import load_config
from memfit.pipeline import open_run
from memfit.process import Emit, run_child

AFTER_STEP = 3
UNAWARE = f"{Path(__file__).stem}:train_unaware"


def train_unaware(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Be a training child that is killed rather than warned."""
    from memfit.training import loop, worker

    loop.MemoryWatch = lambda *_: lambda: None
    return worker.run(job, emit)


def main(config: str, folder: str, group_file: str, limit_bytes: str, watching: str) -> None:
    def limit() -> None:
        while True:  # version 1 of memory groups refuses a limit below what is in use just now
            with contextlib.suppress(OSError):
                Path(group_file).write_text(limit_bytes, encoding="ascii")
                return
            time.sleep(0.01)

    def listen(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)
        if watching == "yes" and event["event"] == "step" and event["step"] == AFTER_STEP:
            threading.Thread(target=limit).start()

    run = open_run(
        load_config(Path(config)),
        runs=Path(folder) / "runs",
        store=Path(folder) / "store",
        run_dir=Path(folder) / "runs" / "run",
        on_event=listen,
    )
    for step in run.steps[:2]:
        run.perform(step)
    if watching == "no":
        limit()
        pipelines.run_child = lambda target, *given, **settings: run_child(UNAWARE, *given, **settings)
    run.perform(run.steps[2])


if __name__ == "__main__":
    main(*sys.argv[1:])
