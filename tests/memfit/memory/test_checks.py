"""What a program's loss is taken for is found out on a few samples, and the cure is named."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.memory.checks import check_loss
from memfit.memory.plan import Candidate
from memfit.step import TrainingProgram

CANDIDATE = Candidate(1, 8)
TOKENS = 6


def make_batch(n, seq_len=None):
    """Sequences of different lengths: 2, 3, 4, ... tokens count."""
    lengths = torch.arange(n) % (TOKENS - 1) + 2
    return {
        "x": torch.randn(n, seq_len or TOKENS, 3),
        "mask": (torch.arange(seq_len or TOKENS) < lengths[:, None]).float(),
    }


def errors(model, batch):
    return model(batch["x"]).squeeze(-1).pow(2)


def mean(model, batch):
    return errors(model, batch).mean()


def program(loss, **changes) -> TrainingProgram:
    settings = {
        "build_model": lambda: nn.Linear(3, 1),
        "make_batch": make_batch,
        "loss": loss,
        "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    }
    return TrainingProgram(**{**settings, **changes})


def token_mean(model, batch):
    return (errors(model, batch) * batch["mask"]).sum() / batch["mask"].sum()


def contrastive(model, batch):
    """Every sample is compared with all others."""
    features = model(batch["x"]).flatten(1)
    return nn.functional.cross_entropy(features @ features.T, torch.arange(len(features)))


def token_sums(model, batch):
    return {"tokens": (errors(model, batch) * batch["mask"]).sum()}


def count_tokens(batch):
    return {"tokens": float(batch["mask"].sum())}


def refused(loss, candidate=CANDIDATE, **changes) -> str:
    with pytest.raises(ConfigError) as raised:
        check_loss(program(loss, **changes), candidate)
    return str(raised.value)


def test_a_mean_over_the_samples_is_what_is_expected():
    check_loss(program(mean), CANDIDATE)


def test_a_sum_without_a_count_is_refused_with_the_cure():
    said = refused(lambda model, batch: errors(model, batch).sum())
    assert "expected a mean over the samples, got a sum" in said
    assert "count={'loss': n}" in said


def test_a_sum_of_samples_that_are_means_is_a_sum_too():
    assert "got a sum" in refused(lambda model, batch: errors(model, batch).mean(dim=1).sum())


@pytest.mark.parametrize("loss", [token_mean, contrastive])
def test_a_mean_that_does_not_decompose_is_refused_with_both_cures(loss):
    said = refused(loss)
    assert "expected a mean over the samples" in said
    assert "give count" in said
    assert "decomposes=False" in said
    assert "got a sum" not in said


def test_a_loss_that_is_declared_not_to_decompose_is_accepted():
    check_loss(program(contrastive, decomposes=False), CANDIDATE)


def test_a_declaration_does_not_excuse_a_loss_that_is_no_number():
    assert "finite" in refused(lambda model, batch: contrastive(model, batch) * float("nan"), decomposes=False)


def test_sums_per_term_with_a_count_are_accepted():
    check_loss(program(token_sums, count=count_tokens), CANDIDATE)


def test_sums_per_term_count_samples_by_default():
    check_loss(program(lambda model, batch: {"a": errors(model, batch).mean(dim=1).sum()}), CANDIDATE)


@pytest.mark.parametrize(("value", "got"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_is_refused(value, got):
    said = refused(lambda model, batch: mean(model, batch) * value)
    assert "expected a finite number" in said
    assert f"got {got}" in said
    assert "make_batch" in said


def test_the_term_at_fault_is_named():
    def terms(model, batch):
        return {"good": errors(model, batch).sum(), "bad": errors(model, batch).sum() / 0 * 0}

    assert "loss 'bad'" in refused(terms)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: mean(model, batch).detach(),
        lambda model, batch: torch.tensor(1.0),
    ],
)
def test_a_loss_without_a_graph_is_refused(loss):
    said = refused(loss)
    assert "without a graph" in said
    assert "detach" in said


def test_a_model_without_trainable_parameters_has_no_graph():
    def frozen():
        return nn.Linear(3, 1).requires_grad_(False)

    assert "leave some parameters trainable" in refused(mean, build_model=frozen)


def test_a_loss_per_sample_is_refused():
    said = refused(lambda model, batch: errors(model, batch).mean(dim=1))
    assert "expected a tensor without dimensions, got shape [2]" in said


@pytest.mark.parametrize("loss", [lambda model, batch: 1.0, lambda model, batch: mean(model, batch).item()])
def test_a_loss_that_is_no_tensor_is_refused(loss):
    assert "expected a tensor without dimensions, got float" in refused(loss)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_batch_of_another_size_is_refused(more):
    said = refused(mean, make_batch=lambda n, seq_len: make_batch(n + more))
    assert f"make_batch: expected 2 samples, got {2 + more}" in said


def test_checks_with_as_many_samples_as_the_smallest_micro_batch_needs():
    """Batch statistics need two samples while training; evaluation takes the running ones, so that halves agree."""
    seen = []

    def counting(model, batch):
        seen.append(len(batch["x"]))
        return model(batch["x"].mean(dim=1)).pow(2).mean()

    def build():
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))

    check_loss(program(counting, build_model=build, min_micro_batch_size=2), CANDIDATE)
    assert set(seen) == {4, 2}


def test_the_candidates_own_sequence_length_and_variant_are_checked():
    built, lengths = [], []

    def make(n, seq_len):
        lengths.append(seq_len)
        return make_batch(n, seq_len)

    def build(name):
        return lambda: built.append(name) or nn.Linear(3, 1)

    variants = {"full": build("full"), "light": build("light")}
    check_loss(
        program(mean, build_model=None, variants=variants, make_batch=make),
        replace(CANDIDATE, variant="light", seq_len=16),
    )
    assert (set(built), set(lengths)) == ({"light"}, {16})


@pytest.mark.parametrize("loss", [mean, token_mean])
def test_the_callers_random_state_is_unchanged(loss):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    if loss is mean:
        check_loss(program(loss), CANDIDATE)
    else:
        refused(loss)
    assert torch.equal(torch.get_rng_state(), before)
