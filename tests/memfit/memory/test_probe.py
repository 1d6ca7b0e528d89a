"""One probe: every phase is run, an OOM is a figure, any other error is an error."""

import pickle
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.memory import forecast, outlook
from memfit.memory import probe as room
from memfit.memory.outlook import load_program
from memfit.memory.plan import Candidate, Probe, evaluation_batch_size
from memfit.memory.probe import Prober, run
from memfit.memory.simulate import CannotSimulateError
from memfit.step import TrainingProgram, materialize_state

MIB, GIB = 2**20, 2**30
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
    return [prober(candidate) for candidate in ladder], events


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
    assert probes[1].phase == "train_step"
    assert probes[1].peak_bytes is None
    assert probes[1].samples_per_second is None


def test_a_peak_over_the_budget_does_not_fit():
    probes, _ = measure(program([]), LADDER[:1], budget_bytes=1)
    assert probes[0].outcome == "over_budget"
    assert probes[0].peak_bytes > 1
    assert probes[0].samples_per_second > 0


def hungry(num_bytes: int, phase: str) -> TrainingProgram:
    """Take memory in one phase alone."""

    def evaluate(model, batch):
        return torch.ones(num_bytes // 4) if phase == "evaluate" else None

    def save(model, optimizer, folder):
        return torch.ones(num_bytes // 4) if phase == "save" else None

    return replace(program([]), build_model=None, evaluate=evaluate, save=save)


@pytest.mark.parametrize("phase", ["evaluate", "save"])
def test_the_phase_that_binds_is_named(phase):
    probes, _ = measure(hungry(300 * MIB, phase), LADDER[:1], budget_bytes=MIB)
    assert (probes[0].outcome, probes[0].phase) == ("over_budget", phase)
    fitting, _ = measure(hungry(4, phase), LADDER[:1])
    assert (fitting[0].outcome, fitting[0].phase) == ("fits", None)


def test_out_of_memory_while_evaluating_is_told_from_training():
    def evaluate(model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    probes, _ = measure(replace(program([]), build_model=None, evaluate=evaluate), LADDER[:1])
    assert (probes[0].outcome, probes[0].phase) == ("oom", "evaluate")


def test_a_model_is_built_once_for_a_ladder_and_anew_for_another():
    built, lengths = [], []

    def build():
        built.append(1)
        return nn.Linear(3, 1)

    def make_batch(n, seq_len):
        lengths.append(seq_len)
        return torch.ones(n, 3)

    counting = replace(program([]), build_model=build, variants={}, make_batch=make_batch)
    ladder = [replace(candidate, seq_len=length) for length in (128, 64) for candidate in LADDER[:2]]
    probes, events = measure(counting, ladder)
    assert len(built) == 2
    assert [event["phase"] for event in events if event["event"] == "phase"].count("build") == 2
    assert list(dict.fromkeys(lengths)) == [128, 64]
    assert [probe.seq_len for probe in probes] == [128, 128, 64, 64]


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


def double(model, optimizer):
    """Something that a file can hold, in place of a function that only this process knows."""


def test_builds_the_program_that_was_pickled(tmp_path):
    chosen = TrainingProgram(build_model=dict, make_batch=list, optimizer=double)
    (tmp_path / "program").write_bytes(pickle.dumps(chosen))
    assert load_program({"pickle": str(tmp_path / "program")}).variants == {"default": dict}


@pytest.fixture
def run_here(monkeypatch):
    """Call what a child runs, in this process: without a limit, and with a program that is not loaded."""
    monkeypatch.setattr(room.enforcement, "enforce_budget", lambda budget_bytes, device: None)

    def call(function, chosen: TrainingProgram, *, budget_bytes: int = 100 * GIB, **further):
        monkeypatch.setattr(room, "load_program", lambda description: chosen)
        monkeypatch.setattr(outlook, "load_program", lambda description: chosen)
        payload = {"program": {}, "budget_bytes": budget_bytes, "global_batch_size": 8, "device": "cpu", "clip": 1.0}
        events = []
        payload |= {"user_devices": [], "candidates": [asdict(c) for c in LADDER], "verifying": False, "check": False}
        return function({**payload, **further}, events.append), events

    return call


def test_a_climb_tells_what_it_expects_of_every_rung_before_it_runs_one(run_here):
    _, events = run_here(run, program([]))
    assert events[0]["event"] == "predicted"
    assert len(events[0]["bytes"]) == 3
    found = [event["probe"] for event in events if event["event"] == "probe"]
    assert [probe["micro_batch_size"] for probe in found] == [2, 4, 8]
    assert [probe["predicted_bytes"] for probe in found] == events[0]["bytes"]
    assert all(probe["upper_bytes"] >= probe["predicted_bytes"] > 100 * MIB for probe in found)


def test_a_confirmation_runs_before_anything_is_simulated(run_here, monkeypatch):
    order = []
    real = forecast.simulate
    monkeypatch.setattr(forecast, "simulate", lambda *given, **how: order.append("simulated") or real(*given, **how))
    chosen = replace(program([]), build_model=None, save=lambda *_: order.append("saved"))
    _, events = run_here(run, chosen, candidates=[asdict(LADDER[1])], verifying=True)
    assert order[:2] == ["saved", "simulated"]
    assert next(event for event in events if event["event"] == "predicted")["bytes"] == []
    assert events[-1]["probe"]["predicted_bytes"] > 0


def test_what_cannot_be_simulated_is_measured(run_here, monkeypatch):
    def cannot(*_, **__):
        raise CannotSimulateError("real values are needed")

    monkeypatch.setattr(forecast, "simulate", cannot)
    _, events = run_here(run, program([]))
    found = [event["probe"] for event in events if event["event"] == "probe"]
    assert [(probe["outcome"], probe["predicted_bytes"]) for probe in found] == [("fits", None)] * 3


def test_layouts_that_are_about_as_fast_are_timed_again_in_turns(run_here, monkeypatch):
    monkeypatch.setattr(room, "contenders", lambda probes: probes[:2])
    monkeypatch.setattr(room, "_AGAIN_SECONDS", 0.2)
    calls = []
    _, events = run_here(run, program(calls))
    first = {event["probe"]["micro_batch_size"]: event["probe"] for event in events if event["event"] == "probe"}
    again = {event["probe"]["micro_batch_size"]: event["probe"] for event in events if event["event"] == "timed"}
    assert set(again) == {2, 4}
    for size, probe in again.items():
        assert probe["step_seconds"] <= first[size]["step_seconds"] * (1 + 1e-9)
        assert probe["samples_per_second"] == pytest.approx(8 / probe["step_seconds"])
        assert probe["peak_bytes"] == first[size]["peak_bytes"]
    sizes = [size for what, size, *_ in calls if what == "loss"]
    since = len(sizes) - sizes[::-1].index(8)
    turns = [size for size, before in zip(sizes[since:], [0, *sizes[since:]]) if size != before]
    assert turns[:3] == [2, 4, 2]


def test_a_loss_is_checked_only_if_asked_for(run_here):
    def total(model, batch):
        return model(batch).sum()

    wrong = replace(program([]), build_model=None, loss=total)
    run_here(run, wrong)
    with pytest.raises(ConfigError, match="count"):
        run_here(run, wrong, check=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))

    def forward(self, x):
        return x + self.inner(x)


def test_relief_estimates_one_change_at_a_time_the_mildest_first(run_here):
    def net(blocks):
        return nn.Sequential(*[Block() for _ in range(blocks)], nn.Linear(64, 1))

    sequences = TrainingProgram(
        variants={"full": lambda: net(8), "light": lambda: net(2)},
        make_batch=lambda n, seq_len: torch.ones(n, seq_len, 64),
        loss=lambda model, batch: model(batch).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        blocks=(Block,),
    )
    smallest = Candidate(1, 8, "fp32", "none", "full", 4096)
    failed = asdict(Probe(**asdict(smallest), outcome="oom"))
    found, _ = run_here(outlook.relief_in_child, sequences, probe=failed, device="t4")
    assert [each["change"] for each in found] == [
        "", "plan.checkpointing 'blocks'", "plan.precisions 'fp16'", "seq_len 2048", "the variant 'light'",
    ]  # fmt: skip
    asis, *changes = [each["upper_bytes"] for each in found]
    assert all(change < asis for change in changes)
    assert {each["phase"] for each in found} == {"train_step"}

    recomputed = {**failed, "checkpointing": "blocks"}
    checkpointed, _ = run_here(outlook.relief_in_child, sequences, probe=recomputed, device="t4")
    assert checkpointed[0]["upper_bytes"] == changes[0]
    assert "plan.checkpointing 'blocks'" not in [each["change"] for each in checkpointed]
