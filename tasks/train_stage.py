"""The task that trains one stage."""

from prefect import task

from tasks.retrying import RETRIES, child_died
from tasks.run_access import StepRecord, perform, record
from tasks.stage_progress import StageProgress


@task(
    name="train-stage",
    task_run_name="train-{stage}",
    persist_result=False,
    retry_condition_fn=child_died,
    **RETRIES,
)
def train_stage(stage: str, run_dir: str, store: str, fresh: bool = False) -> StepRecord:
    """Train a stage under its plan, go on from its last checkpoint, or take it from an earlier run."""
    progress, entry = StageProgress(stage), None
    try:
        entry = record(perform(f"train:{stage}", run_dir, store, fresh, also=progress), f"train:{stage}")
    finally:
        progress.close(entry)
    return entry
