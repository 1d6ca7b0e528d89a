"""The task that turns sources into memory-mapped arrays."""

from prefect import task

from tasks.run_access import StepRecord, perform, record


@task(name="prepare-data", persist_result=False)
def prepare_data(run_dir: str, store: str, fresh: bool = False) -> StepRecord:
    """Prepare the run's data, or take it from the store."""
    return record(perform("prepare", run_dir, store, fresh), "prepare")
