"""The flow `plan-memory`: find out how every stage of a config fits into a memory budget, and train nothing.

python -m flows.plan_memory configs/weather_quick.toml --budget 1GiB
"""

from typing import Any

from prefect import flow

from flows import flow_parameters as given
from flows.ownership import owned
from tasks.plan_memory import plan_memory
from tasks.prepare_data import prepare_data
from tasks.run_access import summarize


@flow(name="plan-memory", flow_run_name=given.name_from_config, persist_result=False)
def plan_config(
    config: given.ConfigPath,
    overrides: given.Overrides = (),
    budget: given.Budget = "",
    device: given.PlannedDevice = "",
    run_dir: given.RunDir = "",
    resume: given.Resume = False,
    fresh: given.Fresh = False,
    runs: given.Runs = "",
    store: given.Store = "",
) -> dict[str, Any]:
    """Prepare data and find out how every stage fits into the budget; a later `train-model` reuses the plan."""
    settings = given.read_parameters(config, overrides, budget, device)
    opened = given.open_directory(settings, run_dir=run_dir, resume=resume, fresh=fresh, runs=runs, store=store)
    where = (str(opened.run.path), str(opened.store), fresh)
    with owned(opened):
        prepare_data(*where)
        plan_memory(*where)
        return summarize(*where)


if __name__ == "__main__":
    from flows.command_line import run_from_command_line

    run_from_command_line(plan_config)
