"""One probe: every phase is run, an OOM is a figure, any other error is an error."""

import pytest
import torch
from torch import nn

from memfit.memory.plan import Candidate
from memfit.memory.probe import Prober, evaluation_batch_size, load_program, materialize_state
from memfit.step import TrainingProgram

GIB = 2**30
LADDER = [Candidate(2, 4), Candidate(4, 2), Candidate(8, 1)]


def program(calls: list, *, limit: int = 10**9, error: Exception | None = None) -> TrainingProgram:
    """Note what is run; fail in the loss of micro-batches above a limit."""

    def loss(model, batch):
        calls.append(("loss", len(batch)))
        if len(batch) > limit:
            raise error or RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return model(batch).mean()

    def evaluate(model, batch):
        calls.append(("evaluate", len(batch), model.training, torch.is_grad_enabled()))

    def save(model, optimizer, folder):
        calls.append(("save", folder.is_dir(), len(optimizer.state)))

    return TrainingProgram(
        variants={"only": lambda: nn.Linear(3, 1)},
        make_batch=lambda n, _seq_len: torch.ones(n, 3),
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(model.parameters()),
        evaluate=evaluate,
        save=save,
    )


def measure(chosen: TrainingProgram, ladder=LADDER, budget_bytes: int = 100 * GIB):
    events = []
    prober = Prober(chosen, "cpu", budget_bytes, 8, None, events.append)
    return list(prober.measure(ladder, False)), events


def test_runs_training_evaluation_and_a_checkpoint_write():
    calls = []
    probes, events = measure(program(calls), LADDER[:1])
    assert [event["phase"] for event in events if event["event"] == "phase"] == [
        "build",
        "optimizer_state",
        "train_step",
        "evaluate",
        "save",
    ]
    assert calls[-2] == ("evaluate", 8, False, False)
    assert calls[-1] == ("save", True, 2)
    assert {call[1] for call in calls if call[0] == "loss"} == {2}
    assert probes[0].outcome == "fits"
    assert probes[0].peak_bytes > 0


def test_the_first_forward_pass_already_finds_optimizer_state():
    made, seen = [], []

    def optimizer(model):
        made.append(torch.optim.Adam(model.parameters()))
        return made[0]

    def loss(model, batch):
        seen.append(len(made[0].state))
        return model(batch).mean()

    chosen = program([])
    measure(TrainingProgram(variants=chosen.variants, make_batch=chosen.make_batch, loss=loss, optimizer=optimizer))
    assert set(seen) == {2}


def test_step_seconds_are_those_of_the_whole_global_batch():
    probes, _ = measure(program([]))
    for probe in probes:
        assert probe.samples_per_second == pytest.approx(8 / probe.step_seconds)


def test_says_what_it_tries_before_it_tries_it():
    _, events = measure(program([]))
    tried = [event["candidate"]["micro_batch_size"] for event in events if event["event"] == "trying"]
    assert tried == [2, 4, 8]


def test_an_oom_is_a_probe_without_figures():
    probes, _ = measure(program([], limit=3), LADDER[:2])
    assert [probe.outcome for probe in probes] == ["fits", "oom"]
    assert "can't allocate memory" in probes[1].message
    assert probes[1].peak_bytes is None
    assert probes[1].samples_per_second is None


def test_a_peak_over_the_budget_does_not_fit():
    probes, _ = measure(program([]), LADDER[:1], budget_bytes=1)
    assert probes[0].outcome == "over_budget"
    assert probes[0].peak_bytes > 1


def test_another_error_is_raised():
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure(program([], limit=1, error=RuntimeError("shapes differ")))


def test_optimizer_state_is_there_before_the_first_step():
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([model.weight], lr=0.1)
    materialize_state(model, optimizer)
    assert optimizer.state[model.weight]["exp_avg"].shape == (1, 3)
    assert model.weight.grad is None


@pytest.mark.parametrize(("micro", "size", "expected"), [(8, 64, 32), (64, 64, 64), (1, 2, 2), (7, 13, 13)])
def test_evaluation_batches_are_larger_than_micro_batches_but_not_than_the_global_batch(micro, size, expected):
    assert evaluation_batch_size(Candidate(micro, 1), size) == expected


def test_builds_the_program_that_a_description_names(monkeypatch):
    import sys
    import types

    module = types.ModuleType("described")
    module.build = lambda arguments: program([], **arguments)
    monkeypatch.setitem(sys.modules, "described", module)
    chosen = load_program({"factory": "described:build", "arguments": {"limit": 2}})
    assert chosen.build().in_features == 3
