"""The health of an epoch: gradients as they were before clipping, what is warned of, and nothing else changed."""

import json
import math

import pytest
import torch
from torch import nn

from memfit.step import StepLayout, TrainingProgram, TrainingStep
from memfit.training import loop
from memfit.training.health import HealthWatch, sampled_steps
from memfit.training.stage import Progress


class Trained:
    """A net under a step and a watch, and what an epoch of some batches is summed up as."""

    def __init__(self, model: nn.Module, *, precision: str = "fp32", clip: float | None = None, lr: float = 0.0):
        program = TrainingProgram(
            build_model=lambda: model,
            make_batch=lambda n, _seq_len: None,
            loss=lambda net, batch: {"mse": (net(batch["x"]) - batch["y"]).square().sum()},
            optimizer=lambda net: torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr),
        )
        self.model, self.progress = model, Progress()
        self.step = TrainingStep(StepLayout(precision=precision), program, model, program.optimizer(model), clip=clip)
        self.watch = HealthWatch(self.step, self.progress)

    def epoch(self, batches: list[dict[str, torch.Tensor]]) -> dict:
        self.watch.begin_epoch(len(batches))
        for self.progress.batch, batch in enumerate(batches):
            self.step(batch)
        return self.watch.close_epoch()


def batch(seed: int, inputs: int = 4, outputs: int = 2, n: int = 8) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, inputs, generator=random), "y": torch.randn(n, outputs, generator=random)}


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def gradient_norm(module: nn.Module, model: nn.Module, given: dict[str, torch.Tensor]) -> float:
    loss = (model(given["x"]) - given["y"]).square().sum() / len(given["x"])
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def kinds(health: dict) -> dict[str, list[str]]:
    return {warning["kind"]: warning["layers"] for warning in health["warnings"]}


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(1, [0]), (6, [0]), (8, [0, 4]), (10, [0, 5]), (100, [0, 12, 25, 37, 50, 62, 75, 87])],
)
def test_looks_at_the_first_step_and_at_few_others_evenly_spaced(num_steps, expected):
    assert sampled_steps(num_steps) == expected


def test_gradient_norms_are_those_before_clipping_of_the_steps_that_were_looked_at():
    trained = Trained(small_net(), clip=1e-3)
    batches = [batch(seed) for seed in range(8)]
    health = trained.epoch(batches)
    seen = [batches[index] for index in (0, 4)]
    assert health["sampled_steps"] == 2
    for name, module in (("0", trained.model[0]), ("2", trained.model[2])):
        norms = [gradient_norm(module, trained.model, given) for given in seen]
        assert health["layers"][name]["gradient_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
        assert health["layers"][name]["gradient_norm_max"] == pytest.approx(max(norms), rel=1e-5)
    whole = [gradient_norm(trained.model, trained.model, given) for given in seen]
    assert health["total"]["gradient_norm"] == pytest.approx(sum(whole) / 2, rel=1e-5)
    figures = health["layers"]["0"]
    assert figures["ratio"] == pytest.approx(figures["gradient_norm"] / figures["weight_norm"], rel=1e-5)


def test_every_epoch_begins_anew():
    trained = Trained(small_net())
    first, _, again = (trained.epoch([batch(seed)]) for seed in (1, 2, 1))
    assert again == first
    assert trained.progress.health == {}


def test_an_event_holds_nothing_that_json_lacks():
    model = nn.Sequential(nn.RNN(4, 3), nn.Linear(3, 2))
    model[0].forward = lambda x, forward=model[0].forward: forward(x)[0]
    with torch.no_grad():
        model[0].weight_hh_l0.fill_(float("inf"))
        model[1].weight.zero_()
    health = Trained(model).epoch([batch(0)])
    assert json.loads(json.dumps(health, allow_nan=False)) == health
    assert health["recurrent"] == {"0.weight_hh_l0": {"hidden": [None] * 3}}
    assert health["layers"]["0"]["max"] is health["total"]["gradient_norm"] is None


def test_frozen_layers_are_left_out():
    model = small_net()
    model[0].requires_grad_(requires_grad=False)
    assert list(Trained(model).epoch([batch(0)])["layers"]) == ["2"]


def test_a_net_of_complex_numbers_has_no_layers_and_is_no_error():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 2, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(self.weight.dtype) @ self.weight).abs()

    health = Trained(Complex()).epoch([batch(0)])
    assert (health["layers"], health["warnings"], health["total"]["gradient_norm"]) == ({}, [], None)


def test_units_are_dead_where_no_step_gave_them_a_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.no_grad():
        model[0].bias[:7] = -1e3
    health = Trained(model).epoch([batch(seed) for seed in range(8)])
    assert [health["layers"][name]["dead_units"] for name in ("0", "2")] == [7, 0]
    assert [health["layers"][name]["num_units"] for name in ("0", "2")] == [10, 2]
    assert kinds(health) == {"dead_units": ["0"]}


def test_a_unit_that_one_step_reached_is_alive():
    """Its input is positive in the fifth batch alone."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    batches = [{"x": torch.full((2, 1), -1.0 if index != 4 else 1.0), "y": torch.ones(2, 1)} for index in range(8)]
    assert Trained(model).epoch(batches)["layers"]["0"]["dead_units"] == 0
    batches[4] = batches[0]
    assert Trained(model).epoch(batches)["layers"]["0"]["dead_units"] == 1


def test_a_layer_that_the_loss_does_not_use_has_no_gradient():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    health = Trained(Unused()).epoch([batch(0)])
    assert kinds(health) == {"no_gradient": ["spare"]}
    assert health["layers"]["spare"]["dead_units"] == 2


def deep(activation: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), activation())]
    return nn.Sequential(nn.Linear(4, 16), activation(), *layers, nn.Linear(16, 2))


def test_gradients_that_vanish_on_their_way_down_are_warned_of():
    """Ten layers of sigmoids, each of which passes on at most a quarter; the ninth and tenth are near the loss."""
    layers = kinds(Trained(deep(nn.Sigmoid)).epoch([batch(0)]))["vanishing"]
    assert layers[:4] == ["0", "2", "4", "6"]
    assert not {"16", "18"} & set(layers)
    assert kinds(Trained(deep(nn.Tanh)).epoch([batch(0)])) == {}


def test_what_vanishes_over_time_does_not_show_in_the_gradients_of_layers():
    """Five layers over 100 steps, of which only the last counts: the first ones reach nothing, the layers all learn."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 16, num_layers=5, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    given = {"x": torch.randn(8, 100, 4, requires_grad=True), "y": torch.ones(8, 2)}
    health = Trained(Recurrent()).epoch([given])
    steps = given["x"].grad.norm(dim=(0, 2))
    assert steps[0] < 1e-12 * steps[-1]
    assert kinds(health) == {}
    assert [name for name in health["layers"] if name != "head"] == [f"rnn.l{layer}" for layer in range(5)]


@pytest.mark.parametrize(("scale", "layers"), [(1e4, ["0", "2"]), (1.0, None)])
def test_gradients_that_explode_are_warned_of(scale, layers):
    given = batch(0)
    given["y"] *= scale
    health = Trained(small_net()).epoch([given])
    assert kinds(health) == ({"exploding": layers} if layers else {})


def test_a_net_that_has_nothing_left_to_learn_is_warned_of_as_a_whole():
    model, given = small_net(), batch(0)
    given["y"] = model(given["x"]).detach() + 1e-5
    health = Trained(model).epoch([given])
    assert kinds(health) == {"vanishing": []}
    assert "the whole net" in health["warnings"][0]["message"]


def test_many_layers_are_named_in_the_event_and_counted_in_its_message():
    (warning,) = Trained(deep(nn.Sigmoid)).epoch([batch(0)])["warnings"]
    assert warning["message"].endswith(f"in 0, 2, 4, 6 and {len(warning['layers']) - 4} more")


def test_a_gradient_that_is_not_finite_is_warned_of_and_left_out_of_the_mean():
    trained = Trained(small_net())
    batches = [batch(seed) for seed in range(8)]
    alone = trained.epoch([batches[0]])["layers"]["0"]["gradient_norm"]
    batches[4] = {"x": batches[4]["x"] * float("nan"), "y": batches[4]["y"]}
    health = trained.epoch(batches)
    assert kinds(health) == {"not_finite": ["0", "2"]}
    assert health["layers"]["0"]["gradient_norm"] == alone


@pytest.mark.parametrize(("overflows", "warned"), [(1, False), (2, True)])
def test_under_a_loss_scale_an_overflow_is_no_warning_unless_nothing_else_was_seen(overflows, warned):
    trained = Trained(small_net(), precision="fp16")
    batches = [batch(seed) for seed in range(8)]
    for index in (0, 4)[:overflows]:
        batches[index]["x"] = batches[index]["x"] * float("inf")
    assert ("not_finite" in kinds(trained.epoch(batches))) is warned


def test_recurrent_singular_values_are_those_at_the_end_of_the_epoch():
    model = nn.Sequential(nn.GRU(4, 3), nn.Linear(3, 2))
    model[0].forward = lambda x, forward=model[0].forward: forward(x)[0]
    found = Trained(model, lr=0.1).epoch([batch(0)])["recurrent"]["0.weight_hh_l0"]
    update = torch.linalg.svdvals(model[0].weight_hh_l0.detach()[3:6]).tolist()
    assert found["update"] == pytest.approx(update, rel=1e-5)


class Unwatched:
    """In a watch's place."""

    def __init__(self, step, progress):
        pass

    def begin_epoch(self, num_steps):
        pass

    def close_epoch(self):
        return {}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_ends_with_the_same_bits_as_without(attempts, monkeypatch, precision):
    """Dropout is on, and gradients are clipped."""
    chosen = {"plan": {"precision": precision}, "stage": {"epochs": 1}}
    watched, unwatched = attempts("watched", **chosen), attempts("unwatched", **chosen)
    watched.run()
    monkeypatch.setattr(loop, "HealthWatch", Unwatched)
    unwatched.run()
    assert watched.weights("last") == unwatched.weights("last")
    assert watched.of_kind("step") == unwatched.of_kind("step")
    assert watched.of_kind("epoch") == unwatched.of_kind("epoch")


def test_an_event_before_that_of_each_epoch(attempts):
    stage = attempts()
    stage.run()
    kinds = [event["event"] for event in stage.events() if event["event"] != "step"]
    assert kinds == ["stage_start", *["health", "epoch"] * 3, "stage_end"]
    events = stage.of_kind("health")
    assert [event["epoch"] for event in events] == [1, 2, 3]
    assert [event["sampled_steps"] for event in events] == [2] * 3
    steps = [event["gradient_norm"] for event in stage.of_kind("step")][:10]
    assert events[0]["total"]["gradient_norm_max"] == pytest.approx(max(steps[i] for i in (0, 5)), rel=1e-4)


def test_an_epoch_that_was_stopped_is_summed_up_as_one_that_was_not(attempts):
    whole, stopped = attempts("whole", stage={"epochs": 2}), attempts("stopped", stage={"epochs": 2})
    whole.run()
    stopped.run_interrupted(2, 3, 7)
    assert stopped.of_kind("health") == whole.of_kind("health")


def test_after_a_checkpoint_that_lacks_it_the_rest_of_the_epoch_is_summed_up(attempts, monkeypatch):
    stage = attempts(stage={"epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "HealthWatch", Unwatched)
        with pytest.raises(loop.Resumable):
            stage.run(stop_after=5)
    stage.run()
    (event,) = stage.of_kind("health")
    assert event["sampled_steps"] == 1
