"""The task that scores the trained model on the untouched test rows."""

from prefect import task
from prefect.artifacts import create_table_artifact

from tasks.artifact_tables import metric_rows
from tasks.publishing import published
from tasks.retrying import RETRIES, child_died
from tasks.run_access import StepRecord, perform, record


@task(name="evaluate-model", persist_result=False, retry_condition_fn=child_died, **RETRIES)
def evaluate_model(run_dir: str, store: str, fresh: bool = False) -> StepRecord:
    """Score the model and the baselines, or take the scores from an earlier run."""
    pipeline = perform("evaluate", run_dir, store, fresh)
    summary = pipeline.summary()
    where = f"`{pipeline.config.name}` on the untouched test rows, beside trivial baselines. Run: `{run_dir}`"
    with published("the table of scores"):
        table = metric_rows(summary["metrics"], summary["baselines"])
        create_table_artifact(key="metrics", table=table, description=where)
    return record(pipeline, "evaluate")
