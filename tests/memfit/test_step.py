"""The one step: how a batch is cut changes nothing in the gradients, whatever each head counts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memfit.errors import ConfigError
from memfit.step import (
    StepLayout,
    TrainingProgram,
    TrainingStep,
    materialize_state,
    micro_batch_sizes,
    num_samples,
    split_samples,
    tensors_of,
)

WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
IGNORED = -100


class ThreeHeads(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout))
        self.value, self.label, self.flag = nn.Linear(16, 1), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x):
        hidden = self.body(x)
        return self.value(hidden).squeeze(-1), self.label(hidden), self.flag(hidden).squeeze(-1)


def sums(model, batch):
    value, label, flag = model(batch["x"])
    flags = F.binary_cross_entropy_with_logits(flag, batch["flag"], reduction="none")
    return {
        "value": ((value - batch["y"]) ** 2 * batch["y_known"]).sum(),
        "label": F.cross_entropy(label, batch["label"], weight=WEIGHTS, ignore_index=IGNORED, reduction="sum"),
        "flag": (flags * batch["flag_known"]).sum(),
    }


def count(batch):
    known = batch["label"][batch["label"] != IGNORED]
    return {
        "value": float(batch["y_known"].sum()),
        "label": float(WEIGHTS[known].sum()),
        "flag": float(batch["flag_known"].sum()),
    }


def masked_batch(n: int, *, any_flags: bool = True) -> dict[str, torch.Tensor]:
    """Heads count differently; the value term counts nothing in the first four samples."""
    random = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (n,), generator=random)
    label[::5] = IGNORED
    return {
        "x": torch.randn(n, 6, generator=random),
        "y": torch.randn(n, generator=random),
        "y_known": (torch.arange(n) >= min(4, n - 1)).float(),
        "label": label,
        "flag": (torch.arange(n) % 3 == 0).float(),
        "flag_known": torch.full((n,), float(any_flags)) * (torch.arange(n) % 2),
    }


class Recorder(torch.optim.SGD):
    """Counts its steps, and keeps the gradients that it was asked to step with, as one vector."""

    gradients: torch.Tensor
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        parameters = [p for group in self.param_groups for p in group["params"]]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.gradients = torch.cat([part.flatten().clone() for part in parts])
        return super().step(closure)


def program(**changes) -> TrainingProgram:
    settings = {
        "variants": {"only": ThreeHeads},
        "make_batch": lambda n, _seq_len: masked_batch(n),
        "loss": sums,
        "count": count,
        "optimizer": lambda model: Recorder(model.parameters(), lr=0.1),
    }
    return TrainingProgram(**{**settings, **changes})


def new_step(layout: StepLayout, chosen: TrainingProgram | None = None, clip: float | None = None) -> TrainingStep:
    torch.manual_seed(1)
    chosen = chosen or program()
    model = chosen.build()
    return TrainingStep(layout, chosen, model, chosen.optimizer(model), clip=clip)


def gradients(batch, layout: StepLayout, chosen: TrainingProgram | None = None) -> torch.Tensor:
    step = new_step(layout, chosen)
    step(batch)
    return step.optimizer.gradients


def reference(batch) -> torch.Tensor:
    """What autograd says of the whole batch at once, each term over its count."""
    torch.manual_seed(1)
    model, counts = ThreeHeads(), count(batch)
    total = sum(value / counts[term] for term, value in sums(model, batch).items() if counts[term])
    total.backward()
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("n", [16, 13, 5, 1])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(n, k):
    batch = masked_batch(n)
    assert relative(gradients(batch, StepLayout(k)), reference(batch)) < 1e-6


@pytest.mark.parametrize("k", [1, 4, 8])
def test_a_term_that_counts_nothing_in_the_whole_batch_adds_nothing(k):
    batch = masked_batch(13, any_flags=False)
    assert count(batch)["flag"] == 0
    step = new_step(StepLayout(k))
    stats = step(batch)
    assert stats.losses["flag"] == 0.0
    assert relative(step.optimizer.gradients, reference(batch)) < 1e-6


def test_the_masks_of_these_tests_would_expose_a_mean_per_micro_batch():
    batch = masked_batch(13)
    torch.manual_seed(1)
    model, parts = ThreeHeads(), split_samples(batch, micro_batch_sizes(13, 4))
    for part in parts:
        counts = count(part)
        (sum(v / counts[t] for t, v in sums(model, part).items() if counts[t]) / len(parts)).backward()
    naive = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative(naive, reference(batch)) > 1e-2


def test_reported_losses_are_sums_over_global_counts():
    batch = masked_batch(13)
    torch.manual_seed(1)
    counts = count(batch)
    expected = {term: value.item() / counts[term] for term, value in sums(ThreeHeads(), batch).items()}
    stats = new_step(StepLayout(4))(batch)
    assert stats.losses == pytest.approx(expected, rel=1e-6)
    assert stats.total == pytest.approx(sum(expected.values()), rel=1e-6)
    assert stats.num_samples == 13
    assert stats.seconds >= stats.update_seconds > 0


@pytest.mark.parametrize("k", [1, 3])
def test_a_scalar_mean_trains_as_sums_over_counts_do(k):
    batch = masked_batch(13)

    def mean(model, part):
        return F.mse_loss(model(part["x"])[0], part["y"])

    def terms(model, part):
        return {"loss": F.mse_loss(model(part["x"])[0], part["y"], reduction="sum")}

    scalar = gradients(batch, StepLayout(k), program(loss=mean, count=None))
    summed = gradients(batch, StepLayout(1), program(loss=terms, count=lambda part: {"loss": float(num_samples(part))}))
    assert relative(scalar, summed) < 1e-6


@pytest.mark.parametrize("k", [1, 4, 8])
def test_gradients_of_the_real_series_net_do_not_depend_on_the_cut(prepared, tiny_model, k):
    from memfit.workloads.series import SeriesWorkload

    options = {**tiny_model["variants"]["light"], "dropout": 0.0, "attention_dropout": 0.0}
    workload = SeriesWorkload(prepared, {"variant": "light", "variants": {"light": options}}, {"class_balance": True})
    chosen = program(variants=workload.variants(), loss=workload.loss, count=workload.count)
    batch = workload.batch("train", torch.arange(13).numpy())
    whole = gradients(batch, StepLayout(1), chosen)
    assert whole.norm() > 0.1
    assert relative(gradients(batch, StepLayout(k), chosen), whole) < 1e-6


def test_bf16_computes_in_low_precision_and_keeps_fp32_weights():
    batch = masked_batch(13)
    step = new_step(StepLayout(4, precision="bf16"))
    seen = []
    step.model.body[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    step(batch)
    assert seen == [torch.bfloat16] * 4
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}
    assert 0 < relative(step.optimizer.gradients, reference(batch)) < 0.05


def test_fp16_skips_an_overflow_then_recovers():
    step = new_step(StepLayout(2, precision="fp16"))
    before = {name: p.clone() for name, p in step.model.state_dict().items()}
    bad = masked_batch(8)
    bad["y"] = bad["y"] * 1e30
    scale = step.scaler.get_scale()
    skipped = step(bad)
    assert not skipped.stepped
    assert skipped.loss_scale < scale
    assert all(torch.equal(p, before[name]) for name, p in step.model.state_dict().items())
    assert all(p.grad is None for p in step.model.parameters())
    good = step(masked_batch(8))
    assert good.stepped
    assert good.loss_scale == skipped.loss_scale
    assert relative(step.optimizer.gradients, reference(masked_batch(8))) < 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_scaler_a_gradient_that_is_not_finite_leaves_the_weights_alone(precision):
    step = new_step(StepLayout(2, precision=precision), clip=1.0)
    before = {name: p.clone() for name, p in step.model.state_dict().items()}
    bad = masked_batch(8)
    bad["x"][6, 0] = float("nan")
    stats = step(bad)
    assert not stats.stepped
    assert stats.gradient_norm != stats.gradient_norm
    assert all(torch.equal(p, before[name]) for name, p in step.model.state_dict().items())
    assert step(masked_batch(8)).stepped


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_norm_that_is_not_accepted_changes_nothing(precision):
    asked = []
    step = new_step(StepLayout(2, precision=precision), clip=1.0)
    while not step(masked_batch(8)).stepped:  # until the loss scaler has found its scale
        pass
    step.accepts = lambda norm: asked.append(norm) or len(asked) > 1
    before = {name: p.clone() for name, p in step.model.state_dict().items()}
    refused = step(masked_batch(8))
    assert not refused.stepped
    assert asked == [pytest.approx(refused.gradient_norm)]
    assert all(torch.equal(p, before[name]) for name, p in step.model.state_dict().items())
    assert all(p.grad is None for p in step.model.parameters())
    accepted = step(masked_batch(8))
    assert accepted.stepped
    assert accepted.gradient_norm == refused.gradient_norm


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clips_the_unscaled_gradient_and_reports_its_norm_before(precision):
    batch = masked_batch(13)
    free = new_step(StepLayout(4, precision=precision))
    norm = free(batch).gradient_norm
    assert norm == pytest.approx(float(reference(batch).norm()), rel=1e-6 if precision == "fp32" else 0.01)
    clipped = new_step(StepLayout(4, precision=precision), clip=norm / 10)
    assert clipped(batch).gradient_norm == pytest.approx(norm, rel=1e-6)
    assert float(clipped.optimizer.gradients.norm()) == pytest.approx(norm / 10, rel=1e-3)
    assert relative(clipped.optimizer.gradients * 10, free.optimizer.gradients) < 1e-3


def test_steps_once_per_global_batch_and_forgets_its_gradients():
    step = new_step(StepLayout(4))
    before = step.model.value.weight.clone()
    step(masked_batch(13))
    assert step.optimizer.steps == 1
    assert all(p.grad is None for p in step.model.parameters())
    assert not torch.equal(step.model.value.weight, before)


def test_frozen_parameters_stay_as_they_are():
    chosen = program(optimizer=lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    torch.manual_seed(1)
    model = chosen.build()
    model.body.requires_grad_(False)
    before = model.body[0].weight.clone()
    TrainingStep(StepLayout(4), chosen, model, chosen.optimizer(model))(masked_batch(13))
    assert torch.equal(model.body[0].weight, before)


def test_a_micro_batch_is_moved_only_when_its_turn_comes():
    sizes = []
    chosen = program(loss=lambda model, part: sizes.append(num_samples(part)) or sums(model, part))
    new_step(StepLayout(4), chosen)(masked_batch(13))
    assert sizes == [4, 3, 3, 3]


@pytest.mark.parametrize(
    ("n", "k", "sizes"),
    [(13, 4, [4, 3, 3, 3]), (16, 4, [4] * 4), (5, 8, [1] * 5), (1, 1, [1]), (7, 1, [7]), (3, 0, [3])],
)
def test_micro_batches_differ_by_at_most_one(n, k, sizes):
    assert micro_batch_sizes(n, k) == sizes


def test_splits_nested_batches_into_views():
    x = torch.arange(10).reshape(5, 2)
    batch = {"a": x, "rest": [torch.arange(5), (torch.arange(5) * 2, "name")]}
    first, second = split_samples(batch, [3, 2])
    assert second["a"].tolist() == [[6, 7], [8, 9]]
    assert second["rest"][0].tolist() == [3, 4]
    assert first["rest"][1][0].tolist() == [0, 2, 4]
    assert second["rest"][1][1] == "name"
    assert second["a"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert [tuple(tensor.shape) for tensor in tensors_of(batch)] == [(5, 2), (5,), (5,)]


@pytest.mark.parametrize("batch", [{}, ["text"], torch.tensor(1.0)])
def test_a_batch_without_samples_is_refused(batch):
    with pytest.raises(ValueError, match="first dimension is the sample"):
        num_samples(batch)


def test_builds_the_first_variant_unless_told_otherwise():
    chosen = program(variants={"big": lambda: nn.Linear(9, 9), "small": lambda: nn.Linear(2, 2)})
    assert chosen.build().in_features == 9
    assert chosen.build("small").in_features == 2


def test_sparse_gradients_are_normed_and_trained():
    embedding = nn.Embedding(50, 4, sparse=True)
    chosen = TrainingProgram(
        build_model=lambda: embedding,
        make_batch=lambda n, _seq_len: torch.arange(n) % 50,
        loss=lambda model, batch: model(batch).pow(2).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )
    dense = nn.Embedding(50, 4)
    dense.load_state_dict(embedding.state_dict())
    batch, stats = chosen.make_batch(20, None), []
    for model in (embedding, dense):
        step = TrainingStep(StepLayout(4), chosen, model, chosen.optimizer(model), clip=1e-3)
        stats.append(step(batch))
    assert stats[0].gradient_norm == pytest.approx(stats[1].gradient_norm, rel=1e-6)
    torch.testing.assert_close(embedding.weight, dense.weight)


def test_an_optimizer_that_runs_the_model_itself_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="no closure, got LBFGS"):
        TrainingStep(StepLayout(), program(), model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match="no closure, got LBFGS"):
        materialize_state(model, torch.optim.LBFGS(model.parameters()))


def test_lazy_modules_that_have_seen_no_batch_are_refused():
    chosen = TrainingProgram(build_model=lambda: nn.LazyLinear(2), make_batch=torch.ones, optimizer=list)
    with pytest.raises(ConfigError, match="lazy modules that have seen no batch"):
        chosen.build()
