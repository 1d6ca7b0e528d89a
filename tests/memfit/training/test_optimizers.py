"""Optimizers, what they may touch, and how the learning rate moves."""

import math

import pytest
import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.training.optimizers import OPTIMIZERS, Schedule, build_optimizer, freeze_all_but, lr_factor

SCHEDULE = {"warmup_steps": 0, "final_factor": 0.1, "every_steps": 10, "factor": 0.5, "patience": 1}


def net() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 1)})


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_weight_decay_spares_biases_and_norms(name):
    optimizer = build_optimizer(net(), {"name": name, "lr": 0.1, "weight_decay": 0.3})
    assert type(optimizer) is OPTIMIZERS[name]
    shapes = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}
    assert shapes == {0.3: [(4, 3), (1, 4)], 0.0: [(4,), (4,), (4,), (1,)]}
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_every_trainable_parameter_is_in_one_group_and_no_frozen_one():
    model = net()
    model["body"].requires_grad_(False)
    optimizer = build_optimizer(model, {"name": "adam", "lr": 0.1})
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for name in ("norm", "head") for p in model[name].parameters())


def test_settings_reach_the_optimizer():
    sgd = build_optimizer(net(), {"name": "sgd", "lr": 0.1, "momentum": 0.9})
    adam = build_optimizer(net(), {"name": "adamw", "lr": 0.1, "betas": [0.8, 0.95]})
    assert sgd.param_groups[0]["momentum"] == 0.9
    assert adam.param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(
    ("patterns", "trainable"),
    [
        (["*"], {"body", "norm", "head"}),
        (["head.*"], {"head"}),
        (["head.*", "n*.weight", "norm.bias"], {"head", "norm"}),
        (["[bh]*"], {"body", "head"}),
    ],
)
def test_trains_what_a_pattern_names(patterns, trainable):
    model = freeze_all_but(net(), patterns)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_a_pattern_that_matches_nothing_names_the_modules_there_are():
    with pytest.raises(ConfigError, match=r"'haed\.\*' matches no parameter.*body.*head.*norm"):
        freeze_all_but(net(), ["body.*", "haed.*"])


def test_what_the_model_froze_stays_frozen():
    model = net()
    model["body"].requires_grad_(False)
    trained = {name for name, p in freeze_all_but(model, ["*"]).named_parameters() if p.requires_grad}
    assert trained == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    with pytest.raises(ConfigError, match=r"train: .*body.* frozen"):
        freeze_all_but(model, ["body.*"])


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_warm_up_rises_in_a_line_and_never_starts_at_zero(name):
    factor = lr_factor({**SCHEDULE, "name": name, "warmup_steps": 4}, 100)
    assert [factor(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factor(4) == 1.0


def test_cosine_falls_from_one_to_its_final_factor_and_stays():
    factor = lr_factor({**SCHEDULE, "name": "cosine", "warmup_steps": 20}, 120)
    assert factor(20) == 1.0
    assert factor(70) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(45) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(120) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)
    assert all(factor(step) >= factor(step + 1) for step in range(20, 120))


def test_step_halves_every_so_many_steps():
    factor = lr_factor({**SCHEDULE, "name": "step"}, 100)
    assert [factor(step) for step in (0, 9, 10, 19, 20, 35)] == [1, 1, 0.5, 0.5, 0.25, 0.125]


def test_constant_stays():
    factor = lr_factor({**SCHEDULE, "name": "constant"}, 100)
    assert {factor(step) for step in range(200)} == {1.0}


def rates(settings: dict, epochs: list[float], mode: str = "min", steps_per_epoch: int = 3) -> list[float]:
    """Record the lr after every epoch."""
    optimizer = torch.optim.SGD(net().parameters(), lr=0.8)
    schedule = Schedule(optimizer, {**SCHEDULE, **settings}, steps_per_epoch * len(epochs), mode)
    seen = []
    for value in epochs:
        for _ in range(steps_per_epoch):
            optimizer.step()
            schedule.after_step()
        schedule.after_epoch(value)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize(("mode", "values"), [("min", [3, 2, 2, 2, 2]), ("max", [2, 3, 3, 3, 3])])
def test_plateau_cuts_after_epochs_without_a_better_value(mode, values):
    assert rates({"name": "plateau"}, values, mode) == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4])


def test_the_other_schedules_ignore_the_monitored_value():
    assert rates({"name": "constant"}, [3, 9, 9, 9, 9]) == [0.8] * 5


@pytest.mark.parametrize("name", ["constant", "cosine", "step", "plateau"])
def test_a_schedule_goes_on_from_its_state(name):
    def build():
        optimizer = torch.optim.SGD(net().parameters(), lr=0.8)
        return optimizer, Schedule(optimizer, {**SCHEDULE, "name": name, "warmup_steps": 3}, 30, "min")

    def advance(optimizer, schedule, count):
        for _ in range(count):
            optimizer.step()
            schedule.after_step()
            schedule.after_epoch(1.0)
        return optimizer.param_groups[0]["lr"]

    optimizer, schedule = build()
    advance(optimizer, schedule, 7)
    again, resumed = build()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert advance(again, resumed, 9) == advance(optimizer, schedule, 9)
