"""The task that writes the report and says where everything is."""

from prefect import task
from prefect.artifacts import create_markdown_artifact

from tasks.artifact_tables import report_links
from tasks.publishing import published
from tasks.run_access import StepRecord, perform, record


@task(name="write-report", persist_result=False)
def write_report(run_dir: str, store: str, fresh: bool = False) -> StepRecord:
    """Write report.html, and an artifact that links to it and to the ONNX bundle."""
    pipeline = perform("report", run_dir, store, fresh)
    with published("the report"):
        create_markdown_artifact(key="report", markdown=report_links(pipeline.summary()))
    return record(pipeline, "report")
