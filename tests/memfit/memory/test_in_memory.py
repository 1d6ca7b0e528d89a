"""memfit.plan: bad input is refused before any child is started; a plan is run, and the caller stays as he was."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

import memfit
from memfit.errors import ConfigError, DoesNotFitError
from memfit.memory import in_memory
from memfit.memory.plan import HEADROOM

MIB = 2**20
LOCK = threading.Lock()


def program(**changes) -> memfit.TrainingProgram:
    settings = {
        "build_model": lambda: nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2048, 1)),
        "make_batch": lambda n, _seq_len=None: {"x": torch.randn(n, 64), "y": torch.randn(n, 1)},
        "loss": lambda model, batch: (model(batch["x"]) - batch["y"]).pow(2).mean(),
        "optimizer": lambda model: torch.optim.AdamW(model.parameters()),
    }
    return memfit.TrainingProgram(**{**settings, **changes})


def plan(chosen=None, **changes):
    settings = {"global_batch_size": 64, "budget": "1GiB", "device": "cpu"}
    return memfit.plan(chosen or program(), **{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": "0"}, "budget|memory"),
        ({"budget": "-1GiB"}, "-1GiB"),
        ({"budget": "lots"}, "lots"),
        ({"budget": "120%"}, "120%"),
        ({"global_batch_size": 0}, "global_batch_size: expected 1 or more samples, got 0"),
        ({"global_batch_size": 2.5}, "global_batch_size: expected 1 or more samples, got 2.5"),
        ({"num_devices": 0}, "num_devices: expected 1 to 64, a sample for each at least, got 0"),
        ({"num_devices": 65}, "num_devices: expected 1 to 64"),
        ({"precisions": ()}, r"precisions: expected some of \['fp32', 'bf16', 'fp16'\]"),
        ({"precisions": "fp32"}, "precisions: expected some of"),
        ({"precisions": ("fp8",)}, "precisions: expected some of"),
        ({"checkpointing": ("layers",)}, "checkpointing: expected some of"),
        ({"variants": ("light",)}, "variants: expected some of"),
        ({"device": "rtx-9999"}, "rtx-9999"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "mps"}, "mps"),
    ],
)
def test_bad_arguments_are_refused_before_any_child_is_started(monkeypatch, changes, said):
    monkeypatch.setattr(in_memory, "plan_stage", lambda *_: pytest.fail("a search was begun"))
    monkeypatch.setattr(in_memory, "run_child", lambda *_, **__: pytest.fail("a child was started"))
    with pytest.raises(ConfigError, match=said):
        plan(**changes)


@pytest.mark.parametrize(
    ("chosen", "changes", "said"),
    [
        (program(decomposes=False), {"num_devices": 2}, "does not decompose over samples"),
        (program(min_micro_batch_size=65), {}, "min_micro_batch_size: expected at most the global batch of 64, got 65"),
        (program(make_batch=lambda n, _s: (LOCK, torch.ones(n, 64))[1]), {}, "can be pickled"),
    ],
)
def test_programs_that_cannot_be_planned_are_refused(monkeypatch, chosen, changes, said):
    monkeypatch.setattr(in_memory, "plan_stage", lambda *_: pytest.fail("a search was begun"))
    with pytest.raises(ConfigError, match=said):
        plan(chosen, **changes)


def test_what_is_asked_for_is_what_is_planned(monkeypatch):
    asked = []
    monkeypatch.setattr(in_memory, "plan_stage", lambda request, _on_probe: asked.append(request) or request)
    plan(num_devices=3)
    plan(program(decomposes=False))
    plan(program(build_model=None, variants={"full": nn.Identity, "light": nn.Identity}), variants=("light", "full"))
    assert (asked[0].num_devices, asked[0].device_batch_size, asked[0].budget_bytes) == (3, 22, 1024 * MIB)
    assert asked[0].checkpointings == ("none",)  # the program names no blocks
    assert asked[1].min_micro_batch_size == 64
    assert (asked[2].variant, asked[2].wanted_variant) == ("light", "light")
    assert asked[0].fingerprint != asked[1].fingerprint


def test_a_plan_is_run_in_children_and_nothing_of_the_caller_changes():
    model = nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1)).eval()
    optimizer = torch.optim.Adam(model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    threads = threading.active_count()

    chosen = program(build_model=lambda: model, optimizer=lambda built: torch.optim.Adam(built.parameters()))
    found = plan(chosen, global_batch_size=4)

    assert found.verified
    assert found.measured_peak_bytes <= 1024 * MIB * (1 - HEADROOM)
    assert found.micro_batch_size * found.accumulation_steps >= 4 == found.global_batch_size
    assert found.probes[-1].verifying
    assert min(probe.micro_batch_size for probe in found.probes) == 2  # of one sample there are no batch statistics
    assert found.accumulation_steps == 1, "it fits whole, and a cut would change the batch statistics"
    assert "Considered:" in found.explain()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert optimizer.state == {}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    if threads == 1:  # the standard library's generator is everybody's: other threads may draw from it
        assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    assert threading.active_count() == threads

    step = memfit.TrainingStep(found, program(), model.train(), optimizer, clip=1.0)
    assert step(program().make_batch(4)).num_samples == 4


def test_a_budget_below_the_parameters_says_what_would_be_enough():
    huge = program(build_model=lambda: nn.Sequential(nn.Linear(64, 2**21), nn.Linear(2**21, 1)))
    with pytest.raises(DoesNotFitError, match=r"by estimate needs \d+ MiB.*raise the budget to \d+ MiB"):
        plan(huge, budget="512MiB")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"make_batch": lambda n, _s=None: {"x": torch.randn(n + 1, 64), "y": torch.randn(n + 1, 1)}}, "make_batch"),
        ({"loss": lambda model, batch: model(batch["x"]).sum()}, "count"),
        ({"loss": lambda model, batch: model(batch["x"]).detach().mean()}, "graph"),
        ({"loss": lambda model, batch: model(batch["x"]).mean() * float("nan")}, "nan|finite"),
    ],
)
def test_a_loss_or_batch_that_is_not_what_it_is_taken_for_is_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        plan(program(**changes))
