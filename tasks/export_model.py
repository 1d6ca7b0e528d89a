"""The task that exports the model to ONNX and checks it."""

from prefect import task

from tasks.retrying import RETRIES, child_died
from tasks.run_access import StepRecord, perform, record


@task(name="export-model", persist_result=False, retry_condition_fn=child_died, **RETRIES)
def export_model(run_dir: str, store: str, fresh: bool = False) -> StepRecord:
    """Export the ONNX bundle and check it against torch, or take it from an earlier run."""
    return record(perform("export", run_dir, store, fresh), "export")
