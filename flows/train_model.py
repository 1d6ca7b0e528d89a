"""The flow `train-model`: from a TOML config to a checked ONNX bundle, within a memory budget.

python -m flows.train_model configs/weather_quick.toml --set stages.0.lr=3e-4
"""

from typing import Any

from prefect import flow

from flows import flow_parameters as given
from flows.ownership import owned
from tasks.evaluate_model import evaluate_model
from tasks.export_model import export_model
from tasks.plan_memory import plan_memory
from tasks.prepare_data import prepare_data
from tasks.run_access import summarize
from tasks.train_stage import train_stage
from tasks.write_report import write_report


@flow(name="train-model", flow_run_name=given.name_from_config, persist_result=False)
def train_model(
    config: given.ConfigPath,
    overrides: given.Overrides = (),
    budget: given.Budget = "",
    device: given.Device = "",
    run_dir: given.RunDir = "",
    resume: given.Resume = False,
    fresh: given.Fresh = False,
    runs: given.Runs = "",
    store: given.Store = "",
) -> dict[str, Any]:
    """Prepare data, find out how every stage fits into the budget, train, evaluate, export ONNX, and report."""
    settings = given.read_parameters(config, overrides, budget, device)
    opened = given.open_directory(settings, run_dir=run_dir, resume=resume, fresh=fresh, runs=runs, store=store)
    opened.check_trainable()
    where = (str(opened.run.path), str(opened.store), fresh)
    with owned(opened):
        prepare_data(*where)
        plan_memory(*where)
        for stage in settings.stages:
            train_stage(stage.name, *where)
        evaluate_model(*where)
        export_model(*where)
        write_report(*where)
        return summarize(*where)


if __name__ == "__main__":
    from flows.command_line import run_from_command_line

    run_from_command_line(train_model)
