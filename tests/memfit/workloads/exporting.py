"""Export nets of a workload in a process of their own: `python exporting.py WORKLOAD DATA_DIR OUT_DIR MODELS`."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memfit.export.bundle import export_bundle
from memfit.export.signature import Signature
from memfit.workloads.registry import load_workload


def export_all(workload: str, data_dir: Path, out_dir: Path, models: Mapping[str, Any]) -> dict[str, Any]:
    """Export models, given by name as a job has them, one after the other in one child; return their cards.

    `out_dir` then holds a bundle of each, and its weights as `<name>.pt`.
    """
    command = [sys.executable, "-W", "error", __file__, workload, data_dir, out_dir, json.dumps(models)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def export(job: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """Export a net whose running statistics are no longer those of a new one; return the card."""
    workload = load_workload(job)
    torch.manual_seed(0)
    net = next(iter(workload.variants().values()))()
    spec = workload.export(12)
    with torch.no_grad():
        for _ in range(3):
            net.train()(workload.batch("train", range(64))[spec.inputs[0]["name"]])
    card = export_bundle(
        out_dir,
        workload.inference_module(net.eval()),
        inputs=[Signature(**entry) for entry in spec.inputs],
        outputs=[Signature(**entry) for entry in spec.outputs],
        sample_inputs=spec.sample_inputs,
        card={"name": job["workload"], **spec.card},
        support_files=spec.support_files,
    )
    torch.save(net.state_dict(), out_dir.with_suffix(".pt"))
    return card


def main(workload: str, data_dir: str, out_dir: str, models: str) -> None:
    job = {"workload": workload, "data_dir": data_dir, "loss": {}}
    cards = {name: export({**job, "model": model}, Path(out_dir) / name) for name, model in json.loads(models).items()}
    print(json.dumps(cards))


if __name__ == "__main__":
    main(*sys.argv[1:])
