"""Memory that runs out in mid-training: at any allocation of any phase, the run ends as it would have without."""

import contextlib
import gc
import itertools
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfit import pipeline as pipelines
from memfit.config import load_config
from memfit.errors import DoesNotFitError, MemfitError
from memfit.pipeline import open_run
from memfit.process import Outcome, run_child
from memfit.recovery import MAX_SPLITS, RecoveringStep
from memfit.step import StepLayout, TrainingProgram, TrainingStep
from memfit.training import worker, writer

STAGE = {"epochs": 2, "max_steps": 12}
"""Ten steps are an epoch: an evaluation and a checkpoint lie inside."""
MIB = 2**20


@pytest.fixture
def no_copies(monkeypatch):
    """Write every checkpoint at once: none is in the way of a step."""
    monkeypatch.setattr(worker, "room_for_copies", lambda _plan: 0)


@pytest.fixture
def told_to_split(monkeypatch):
    """Make runs switch to so many accumulation steps before a step, as if their plan said so."""

    def tell(at_step: int, accumulation_steps: int) -> None:
        original, calls = RecoveringStep.__call__, []

        def call(self, batch):
            calls.append(1)
            if len(calls) == at_step:
                self.state.accumulation_steps = accumulation_steps
                self._lay_out()
            return original(self, batch)

        monkeypatch.setattr(RecoveringStep, "__call__", call)

    return tell


def trained(attempt) -> tuple[bytes, bytes, list[dict]]:
    """What a run leaves: its weights, and its events but for those of changed layouts."""
    return attempt.weights("last"), attempt.weights("best"), [e for e in attempt.events() if e["event"] != "layout"]


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("step", "share"), [(1, 0.0), (1, 0.9), (5, 0.3), (11, 0.6), (12, 1.0)])
def test_a_step_that_runs_out_is_that_of_a_run_told_to_split_there(
    attempts, faults, told_to_split, monkeypatch, precision, step, share
):
    """Dropout is on, so random states must be rewound; the micro-batch goes from 6 to 3."""
    plan = {"precision": precision}
    attempts("counted", stage=STAGE, plan=plan).run()
    at = max(1, round(share * faults.allocations["train_step"]))
    faults.calls.clear()
    faults.at("train_step", step, at)
    faulted = attempts("faulted", stage=STAGE, plan=plan)
    faulted.run()
    assert faults.raised == 1
    faults.wanted.clear()
    told_to_split(step, 6)
    told = attempts("told", stage=STAGE, plan=plan)
    told.run()
    assert trained(faulted) == trained(told)
    (change,) = faulted.of_kind("layout")
    assert (change["step"], change["micro_batch_size"], change["accumulation_steps"]) == (step, 3, 6)
    assert change["reason"] == "out_of_memory"
    assert "can't allocate memory" in change["message"]


@pytest.mark.usefixtures("no_copies")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(phase=st.sampled_from(["train_step", "update", "evaluate"]), call=st.integers(1, 12), share=st.floats(0, 1))
def test_any_allocation_of_any_phase_may_fail(attempts, faults, phase, call, share):
    """Every step of the run is trained once, and evaluation at another batch size changes nothing."""
    number = itertools.count()
    for known in (faults.calls, faults.wanted, faults.allocations):
        known.clear()
    faults.raised = 0
    whole = attempts(f"whole-{next(number)}-{phase}-{call}-{share}", stage=STAGE)
    whole.run()
    call, at = min(call, faults.calls[phase]), max(1, round(share * faults.allocations[phase]))
    faults.calls.clear()
    faults.at(phase, call, at)
    faulted = attempts(f"faulted-{next(number)}-{phase}-{call}-{share}", stage=STAGE)
    faulted.run()
    assert [event["step"] for event in faulted.of_kind("step")] == list(range(1, 13))
    before = call - 1 if phase == "train_step" else 12 if phase == "evaluate" else 0
    assert losses(faulted)[:before] == losses(whole)[:before]
    assert len(faulted.of_kind("layout")) == faults.raised <= 1
    assert [event["event"] for event in faulted.events()][-1] == "stage_end"


def losses(attempt) -> list[float]:
    return [event["losses"]["total"] for event in attempt.of_kind("step")]


def test_an_update_that_runs_out_goes_back_to_the_checkpoint_and_uses_no_half_new_weights(attempts, faults):
    faults.at("update", 12, 3)
    faulted = attempts("faulted", stage=STAGE)
    faulted.run()
    assert faults.raised == 1
    assert [event["step"] for event in faulted.of_kind("step")] == list(range(1, 13))
    (change,) = faulted.of_kind("layout")
    assert (change["phase"], change["step"], change["micro_batch_size"]) == ("update", 10, 3)
    assert [event["event"] for event in faulted.emitted].count("resume") == 1


def test_the_first_update_may_run_out_too(attempts, faults):
    faults.at("update", 1, 3)
    faulted = attempts("faulted", stage=STAGE)
    faulted.run()
    assert [event["step"] for event in faulted.of_kind("step")] == list(range(1, 13))
    assert faulted.of_kind("layout")[0]["step"] == 0


def test_an_evaluation_that_runs_out_is_repeated_in_halves_with_the_same_scores(attempts, faults):
    attempts("whole", stage=STAGE).run()
    faults.calls.clear()
    faults.at("evaluate", 1, 5)
    faulted, whole = attempts("faulted", stage=STAGE), attempts("again", stage=STAGE)
    faulted.run()
    faults.wanted.clear()
    whole.run()
    (change,) = faulted.of_kind("layout")
    assert (change["phase"], change["eval_batch_size"]) == ("evaluate", 16)
    assert faulted.weights("last") == whole.weights("last")
    for got, expected in zip(faulted.of_kind("epoch"), whole.of_kind("epoch"), strict=True):
        assert got["validation"] == pytest.approx(expected["validation"], rel=1e-6)


@pytest.mark.parametrize(("phase", "call", "stage"), [("train_step", 6, {}), ("evaluate", 1, {"max_steps": 5})])
def test_a_checkpoint_under_way_makes_room_and_nothing_else_changes(attempts, faults, monkeypatch, phase, call, stage):
    """Its copy is what the shortage is for: the step or the evaluation is done once more as it was."""
    stage = STAGE | {"checkpoint_every_steps": 5} | stage
    whole, faulted = attempts("whole", stage=stage), attempts("faulted", stage=stage)
    whole.run()
    release, original = threading.Event(), writer.save_checkpoint

    def save(*given):
        if threading.current_thread().name == "checkpoint":
            assert release.wait(60)
        return original(*given)

    give_way = writer.CheckpointWriter.give_way
    monkeypatch.setattr(writer, "save_checkpoint", save)
    monkeypatch.setattr(writer.CheckpointWriter, "give_way", lambda self: release.set() or give_way(self))
    monkeypatch.setattr(worker, "room_for_copies", lambda _plan: 2**30)
    faults.calls.clear()
    faults.at(phase, call, 9)
    faulted.run()
    assert faults.raised == 1
    assert trained(faulted) == trained(whole)
    assert not faulted.of_kind("layout")


def test_a_checkpoint_write_that_runs_out_is_repeated_and_nothing_half_written_stays(attempts, monkeypatch):
    whole = attempts("whole", stage=STAGE)
    whole.run()
    original, calls = torch.save, []

    def save(state, path):
        calls.append(path)
        if len(calls) == 1:
            path.write_bytes(b"half")
            raise MemoryError
        original(state, path)

    monkeypatch.setattr(torch, "save", save)
    faulted = attempts("faulted", stage=STAGE)
    faulted.run()
    assert trained(faulted) == trained(whole)
    assert sorted(each.name for each in faulted.checkpoints.iterdir()) == sorted(
        each.name for each in whole.checkpoints.iterdir()
    )


def test_a_split_run_that_is_stopped_goes_on_in_its_pieces_bit_for_bit(attempts, faults):
    faults.at("train_step", 3, 20)
    whole = attempts("whole", stage=STAGE)
    whole.run()
    faults.calls.clear()
    stopped = attempts("stopped", stage=STAGE)
    stopped.run_interrupted(5)
    assert trained(stopped) == trained(whole)
    assert stopped.of_kind("layout") == whole.of_kind("layout")


# Under a limit of the kernel's


@pytest.fixture
def limited(importable, tmp_path):
    name = importable(Path(__file__).with_name("memory_targets.py"))

    def train(extra_mib: int, accumulation_steps: int) -> dict:
        payload = {"extra_bytes": extra_mib * MIB, "accumulation_steps": accumulation_steps}
        return run_child(f"{name}:train", payload, log=tmp_path / "log").unwrap("training")

    return train


def test_a_step_beyond_a_real_limit_ends_as_one_that_was_planned_smaller(limited):
    """A layer's activations are 48 MiB at the whole batch, and the limit leaves about as much."""
    faulted = limited(64, 1)
    assert faulted["changes"]
    planned = limited(0, -(-24_576 // faulted["changes"][-1]))
    assert not planned["changes"]
    assert faulted["losses"] == pytest.approx(planned["losses"], rel=1e-6)


# The step by itself


class Net(torch.nn.Module):
    """Has what a failed attempt could change: dropout's random state, batch statistics, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)
        )

    def forward(self, x):
        return self.layers(x).squeeze(-1)


def program(**changes) -> TrainingProgram:
    return TrainingProgram(
        **{
            "build_model": Net,
            "make_batch": lambda n, seq_len=None: {"x": torch.randn(n, 8), "y": torch.randn(n)},
            "loss": lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(),
            "optimizer": lambda model: torch.optim.AdamW(model.parameters()),
            "min_micro_batch_size": 2,
            **changes,
        }
    )


def recovering(accumulation_steps: int = 1, kind: type[TrainingStep] = RecoveringStep, **changes) -> TrainingStep:
    torch.manual_seed(0)
    made = program(**changes)
    model = made.build()
    return kind(StepLayout(accumulation_steps), made, model, made.optimizer(model))


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(16, 8, generator=generator), "y": torch.randn(16, generator=generator)} for _ in range(count)
    ]


def test_a_failed_attempt_leaves_nothing_behind(faults):
    """BatchNorm's statistics and dropout's masks are those of a run that was split from there on."""
    faulted, plain = recovering(), recovering(kind=TrainingStep)
    todo = batches(6)
    faults.at("train_step", 3, 7)
    torch.manual_seed(1)
    for batch in todo:
        faulted(batch)
    assert faults.raised == 1
    faults.wanted.clear()
    torch.manual_seed(1)
    for number, batch in enumerate(todo, 1):
        if number == 3:
            plain.layout = StepLayout(2)
        plain(batch)
    for (name, got), expected in zip(
        faulted.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, expected), name


def live_bytes() -> int:
    gc.collect()
    storages = {
        each.untyped_storage()._cdata: each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if issubclass(type(each), torch.Tensor)
    }
    return sum(storages.values())


def test_what_the_failed_attempt_held_is_free_again_when_the_next_begins(faults):
    wide = {"build_model": lambda: torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(6)], torch.nn.Flatten(0))}
    step = recovering(**wide, loss=lambda model, batch: model(batch["x"]).square().mean())
    held: list[int] = []
    step.on_change = lambda _change: held.append(live_bytes())
    big = {"x": torch.randn(60_000, 8), "y": torch.zeros(60_000)}
    step(big)
    before = live_bytes()
    faults.at("train_step", 2, 14)
    step(big)
    (at_change,) = held
    assert abs(at_change - before) < MIB
    assert faults.raised == 1


def test_every_lever_is_pulled_in_order_and_then_it_says_so(faults):
    class Block(torch.nn.Linear):
        pass

    step = recovering(
        build_model=lambda: torch.nn.Sequential(Block(8, 8), torch.nn.Linear(8, 1), torch.nn.Flatten(0)),
        blocks=(Block,),
    )
    changes = []
    step.on_change = changes.append
    for call in range(1, 20):
        faults.at("train_step", call, 2)
    weights = [value.clone() for value in step.model.state_dict().values()]
    big = {"x": torch.randn(256, 8), "y": torch.randn(256)}
    with pytest.raises(DoesNotFitError, match=r"batch of 256 .* micro-batches of 8, checkpointing blocks.*allow more"):
        step(big)
    assert [change.micro_batch_size for change in changes] == [128, 64, 32, 16, 8, 8]
    assert [change.checkpointing for change in changes] == ["none"] * MAX_SPLITS + ["blocks"]
    assert all(map(torch.equal, weights, step.model.state_dict().values()))


def test_a_micro_batch_below_the_programs_smallest_is_never_tried(faults):
    step = recovering(min_micro_batch_size=8)
    faults.at("train_step", 1, 2)
    faults.at("train_step", 2, 2)
    with pytest.raises(DoesNotFitError, match="micro-batches of 8"):
        step(batches(1)[0])


def test_a_loss_that_does_not_decompose_is_never_cut(faults):
    step = recovering(decomposes=False)
    faults.at("train_step", 1, 2)
    with pytest.raises(DoesNotFitError, match="micro-batches of 16"):
        step(batches(1)[0])


def test_after_enough_clean_steps_it_grows_back_once(faults):
    step = recovering()
    step.clean_steps = 3
    changes = []
    step.on_change = changes.append
    faults.at("train_step", 1, 4)  # shrinks; the repetition is call 2, and steps 2 to 4 are calls 3 to 5
    faults.at("train_step", 5, 4)  # step 4 tries the former size, and fails again
    for batch in batches(12):
        step(batch)
    assert [(change.reason, change.micro_batch_size) for change in changes] == [
        ("out_of_memory", 8),
        ("grown", 16),
        ("out_of_memory", 8),
    ]


def test_an_allocator_that_had_to_give_back_its_cache_twice_in_a_row_shrinks_before_it_fails(monkeypatch):
    retries = iter([0, 0, 0, 1, 1, 2, 2, 2])  # read before and after each step
    monkeypatch.setattr("memfit.recovery._allocator_retries", lambda _device: next(retries))
    step = recovering()
    changes = []
    step.on_change = changes.append
    for number, batch in enumerate(batches(4), 1):
        step(batch)
        assert len(changes) == (number >= 3)
    assert (changes[0].reason, changes[0].micro_batch_size) == ("allocator_retries", 8)


def test_other_errors_are_raised_as_they_are():
    step = recovering(loss=lambda model, batch: model(batch["z"]))
    with pytest.raises(KeyError, match="z"):
        step(batches(1)[0])


@pytest.mark.parametrize(
    ("first", "second", "fails"),
    [
        (Outcome("oom", message="died of SIGABRT", error="SIGABRT"), Outcome("ok"), None),
        (Outcome("failed", message="in phase 'parity'", error="ChildOutOfMemoryError"), Outcome("ok"), None),
        (Outcome("oom", message="m"), Outcome("oom", message="m", phase="graph"), "phase 'graph'.*Raise the budget"),
        (Outcome("failed", message="differs", error="ExportError"), None, "differs"),
    ],
)
def test_an_export_that_runs_out_is_done_once_more_with_the_fewest_rows(
    tiny_config, tmp_path, monkeypatch, first, second, fails
):
    outcomes, samples, events = iter([first, second]), [], []

    def child(_target, job, **_settings):
        samples.append(job["samples"])
        return next(outcomes)

    monkeypatch.setattr(pipelines, "run_child", child)
    run = open_run(load_config(tiny_config), runs=tmp_path / "runs", store=tmp_path / "store", on_event=events.append)
    with pytest.raises(MemfitError, match=fails) if fails else contextlib.nullcontext():
        run._export_through({"samples": 8})
    assert samples == ([8, 4] if second else [8])
    assert [event["event"] for event in events] == (["warning"] if second else [])
