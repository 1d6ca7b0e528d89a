import json
from dataclasses import replace

import pytest

from memfit.errors import RunStateError
from memfit.memory.plan import Plan, Probe

PROBE = Probe(4, 2, "fp32", "none", "light", "fits", 100, 0.5, 16.0, verifying=True)
PLAN = Plan(
    stage="first",
    device="cpu",
    budget_bytes=1000,
    global_batch_size=8,
    micro_batch_size=4,
    accumulation_steps=2,
    precision="fp32",
    checkpointing="none",
    variant="light",
    measured_peak_bytes=100,
    eval_batch_size=8,
    step_seconds=0.5,
    samples_per_second=16.0,
    verified=True,
    levers=({"name": "accumulation_steps", "class": "exact", "value": 2},),
    probes=(PROBE,),
    fingerprint="0" * 16,
    reason="because",
)
KEYS = {
    "stage", "device", "budget_bytes", "global_batch_size", "micro_batch_size", "accumulation_steps", "num_devices",
    "precision", "checkpointing", "seq_len", "variant", "predicted_peak_bytes", "upper_peak_bytes",
    "measured_peak_bytes", "eval_batch_size", "step_seconds", "samples_per_second", "levers", "verified", "probes",
    "fingerprint", "reason",
}  # fmt: skip


def test_survives_json_with_the_documented_keys():
    document = json.loads(json.dumps(PLAN.to_dict()))
    assert set(document) == KEYS
    assert Plan.from_dict(document) == PLAN


def test_figures_that_were_not_measured_are_null():
    document = PLAN.to_dict()
    assert document["predicted_peak_bytes"] is None
    assert document["upper_peak_bytes"] is None
    assert replace(PLAN, measured_peak_bytes=None).to_dict()["measured_peak_bytes"] is None


@pytest.mark.parametrize("change", [{"unheard_of": 1}, {"stage": None}])
def test_a_plan_of_another_version_is_refused(change):
    document = {**PLAN.to_dict(), **change}
    document = {key: value for key, value in document.items() if value is not None or key != "stage"}
    with pytest.raises(RunStateError, match=r"differing in \['(unheard_of|stage)'\]"):
        Plan.from_dict(document)
