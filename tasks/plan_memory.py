"""The task that finds out how every stage fits into the budget."""

from prefect import task
from prefect.artifacts import create_table_artifact

from tasks.artifact_tables import plan_rows
from tasks.publishing import published
from tasks.run_access import StepRecord, perform, record


@task(name="plan-memory", persist_result=False)
def plan_memory(run_dir: str, store: str, fresh: bool = False) -> StepRecord:
    """Plan every stage by running its step under the budget, or take the plans from the store."""
    pipeline = perform("plan", run_dir, store, fresh)
    with published("the table of plans"):
        create_table_artifact(
            key="plan",
            table=plan_rows(pipeline.summary()["plans"]),
            description=f"How every stage of `{pipeline.config.name}` fits into its memory budget. Run: `{run_dir}`",
        )
    return record(pipeline, "plan")
