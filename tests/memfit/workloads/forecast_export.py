"""Export forecasters, one after the other, in one process: `python forecast_export.py DATA_DIR OUT_DIR JSON`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from memfit.export.bundle import export_bundle
from memfit.export.signature import Signature
from memfit.workloads.forecast import ForecastWorkload


def export(data_dir: Path, out_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Export a net whose running statistics are no longer those of a new one; return the card."""
    workload = ForecastWorkload(data_dir, {"variant": "net", "variants": {"net": settings}}, {})
    torch.manual_seed(0)
    net = next(iter(workload.variants().values()))()
    with torch.no_grad():
        for _ in range(3):
            net.train()(workload.batch("train", range(20))["history"])
    spec = workload.export(12)
    card = export_bundle(
        out_dir,
        workload.inference_module(net.eval()),
        inputs=[Signature(**entry) for entry in spec.inputs],
        outputs=[Signature(**entry) for entry in spec.outputs],
        sample_inputs=spec.sample_inputs,
        card={"name": "forecast", **spec.card},
        support_files=spec.support_files,
    )
    torch.save(net.state_dict(), out_dir.with_suffix(".pt"))
    return card


def main(data_dir: str, out_dir: str, models: str) -> None:
    cards = {name: export(Path(data_dir), Path(out_dir) / name, model) for name, model in json.loads(models).items()}
    print(json.dumps(cards))


main(*sys.argv[1:])
