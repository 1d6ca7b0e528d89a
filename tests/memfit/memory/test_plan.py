import json
from dataclasses import replace

import pytest

from memfit.errors import RunStateError
from memfit.memory.plan import Candidate, Plan, Probe, describe

MIB = 2**20
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
    timeline={"phase": ["forward", "backward"], "activations": [1.0, 2.5]},
)
KEYS = {
    "stage", "device", "budget_bytes", "global_batch_size", "micro_batch_size", "accumulation_steps", "num_devices",
    "precision", "checkpointing", "seq_len", "variant", "predicted_peak_bytes", "upper_peak_bytes",
    "measured_peak_bytes", "eval_batch_size", "step_seconds", "samples_per_second", "levers", "verified", "probes",
    "fingerprint", "reason", "timeline", "chunked_loss", "foreach", "in_flight",
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


def test_a_probe_knows_the_layout_that_was_run():
    candidate = Candidate(4, 2, "bf16", "blocks", "light", 512)
    probe = Probe(4, 2, "bf16", "blocks", "light", "fits", seq_len=512)
    assert probe.candidate == candidate
    assert candidate.ladder == replace(candidate, micro_batch_size=8, accumulation_steps=1).ladder
    assert candidate.ladder != replace(candidate, seq_len=256).ladder
    assert json.loads(json.dumps(PLAN.to_dict()))["probes"][0]["seq_len"] is None


def test_a_probe_says_how_long_another_global_batch_takes():
    probe = replace(PROBE, micro_seconds=0.2, update_seconds=0.1)
    other = probe.at(Candidate(4, 8, "fp32", "none", "light"), 32)
    assert other.step_seconds == pytest.approx(8 * 0.2 + 0.1)
    assert other.samples_per_second == pytest.approx(32 / 1.7)
    assert (other.micro_batch_size, other.accumulation_steps) == (4, 8)


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_where_seconds_are_not_known_none_are_given(seconds):
    bare = Probe(4, 2, "fp32", "none", None, "predicted", micro_seconds=seconds, update_seconds=seconds)
    other = bare.at(Candidate(4, 1), 4)
    assert other.accumulation_steps == 1
    assert other.step_seconds is None
    assert other.samples_per_second is None


def test_a_plan_explains_itself():
    refused = Probe(8, 1, "fp32", "none", "light", "over_budget", 1100 * MIB, phase="evaluate", seq_len=512)
    plan = replace(PLAN, budget_bytes=1000 * MIB, measured_peak_bytes=900 * MIB, probes=(PROBE, refused), seq_len=512)
    said = plan.explain()
    layout = "8 samples in 2 micro-batches of at most 4, fp32, checkpointing none, variant light, seq_len 512 on cpu"
    assert layout in said
    assert "900 MiB of 1,000 MiB (measured)" in said
    assert "because" in said
    assert "Lever accumulation_steps = 2 (exact)." in said
    assert describe(PROBE) in said
    assert "micro 4 x 2, fp32, none, confirmed" in said
    assert "micro 8 x 1, fp32, none, seq_len 512, over budget, 1,100 MiB, in phase 'evaluate'" in said


def test_a_plan_that_was_not_run_says_so():
    predicted = {"verified": False, "measured_peak_bytes": None, "predicted_peak_bytes": 700 * MIB}
    said = replace(PLAN, budget_bytes=1000 * MIB, **predicted).explain()
    assert "700 MiB of 1,000 MiB (predicted, not run)" in said
