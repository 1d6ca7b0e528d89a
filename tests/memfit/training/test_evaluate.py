"""Scoring a split: whatever the batch size, and leaving the model as it was."""

import numpy as np
import pytest
import torch

from memfit.step import StepLayout
from memfit.training.evaluate import batches, evaluate_split
from memfit.training.program import from_job, stage_program
from memfit.workloads.series import SeriesWorkload


@pytest.fixture
def workload(prepared, tiny_model):
    return SeriesWorkload(prepared, tiny_model, {"class_balance": True})


@pytest.fixture
def model(workload):
    torch.manual_seed(0)
    built = workload.variants()["light"]()
    torch.nn.init.normal_(built.value_head.weight, std=0.1)
    return built.train()


def test_batches_cover_a_split_once_and_in_order(workload):
    rows = [batch["row"] for batch in batches(workload, "validation", 10)]
    assert {len(part) for part in rows[:-1]} == {10}
    assert torch.cat(rows).tolist() == workload.data.rows("validation").tolist()


def test_neither_losses_nor_predictions_depend_on_the_batch_size(workload, model):
    settings = {"layout": StepLayout()}
    small_losses, small = evaluate_split(workload, model, "validation", batch_size=7, **settings)
    losses, predictions = evaluate_split(workload, model, "validation", batch_size=1000, **settings)
    assert small_losses == pytest.approx(losses, rel=1e-5)
    assert predictions.keys() == {"value", "class_probabilities", "exceeds_probability"}
    for name, prediction in predictions.items():
        assert len(prediction) == workload.num_samples("validation")
        assert small[name] == pytest.approx(prediction, rel=1e-4, abs=1e-5)


def test_the_total_is_the_sum_of_means_as_in_training(workload, model):
    losses, _ = evaluate_split(workload, model, "test", batch_size=8, layout=StepLayout())
    batch = workload.batch("test", np.arange(workload.num_samples("test")))
    with torch.no_grad():
        sums = workload.loss(model.eval(), batch)
    counts = workload.count(batch)
    expected = {term: float(sums[term]) / counts[term] for term in sums}
    assert {term: losses[term] for term in expected} == pytest.approx(expected, rel=1e-5)
    assert losses["total"] == pytest.approx(sum(expected.values()), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_and_the_generator_are_left_alone(workload, model, training):
    model.train(training)
    before = torch.get_rng_state()
    first, _ = evaluate_split(workload, model, "test", batch_size=16, layout=StepLayout(precision="bf16"))
    second, _ = evaluate_split(workload, model, "test", batch_size=16, layout=StepLayout(precision="bf16"))
    assert first == second
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_program_of_a_stage_probes_with_real_rows(workload, prepared, tiny_model, attempts):
    program = stage_program(workload, attempts().job["stage"])
    batch = program.make_batch(500, None)
    assert len(batch["target"]) == 500
    size = workload.num_samples("train")
    assert batch["row"][size] == batch["row"][0]
    assert list(program.variants) == ["light"]
    assert from_job(attempts().job).blocks == program.blocks


def test_what_a_probe_saves_is_what_a_checkpoint_holds(workload, attempts, tmp_path):
    program = stage_program(workload, attempts().job["stage"])
    model = program.build()
    program.save(model, program.optimizer(model), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "state.pt"}
