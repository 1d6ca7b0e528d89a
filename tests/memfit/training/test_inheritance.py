"""What a stage takes over: the same weights, or grown ones, and the optimizer's moments with them."""

import pytest
import torch
from torch import nn

from memfit.errors import CheckpointError, ConfigError
from memfit.models.growth import grow
from memfit.models.language_settings import LanguageSettings
from memfit.models.recurrent_language import RecurrentLanguageModel
from memfit.training.checkpoint import save_checkpoint
from memfit.training.inheritance import Inheritance
from memfit.training.optimizers import build_optimizer, parameter_names

ADAMW = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.01}
SMALL = {"name": "recurrent", "vocab_size": 20, "d_model": 16, "num_layers": 1}
LARGE = {**SMALL, "d_model": 32, "num_layers": 2}


class GrowingWorkload:
    """A workload of which nothing is asked but to carry weights over."""

    def carry(self, tensors, before, model, role):
        return grow(tensors, model, role)


def trained(settings, optimizer=ADAMW, steps=3):
    torch.manual_seed(0)
    model = RecurrentLanguageModel(LanguageSettings(**settings))
    made = build_optimizer(model, optimizer)
    for _ in range(steps):
        made.zero_grad()
        tokens = torch.randint(0, 20, (4, 8))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        made.step()
    return model, made


@pytest.fixture
def start(tmp_path):
    model, optimizer = trained(SMALL)
    state = {
        "optimizer": optimizer.state_dict(),
        "optimizer_kind": "AdamW",
        "parameters": parameter_names(model, optimizer),
    }
    folder = save_checkpoint(tmp_path, model.state_dict(), state, {"step": 3, "model": SMALL}, ("best",))
    return folder, model, optimizer


def inherited(folder, settings, optimizer=ADAMW, workload=None):
    torch.manual_seed(1)
    model = RecurrentLanguageModel(LanguageSettings(**settings))
    made = build_optimizer(model, optimizer)
    inheritance = Inheritance(str(folder), workload or GrowingWorkload(), model, settings)
    inheritance.weights()
    return inheritance, model, made


def test_the_same_model_goes_on_as_if_it_had_never_stopped(start):
    folder, before, optimizer = start
    inheritance, model, made = inherited(folder, SMALL)
    assert not inheritance.changed
    assert inheritance.moments(made) == len(list(model.parameters()))
    for one, other in ((before, optimizer), (model, made)):
        torch.manual_seed(2)
        tokens = torch.randint(0, 20, (4, 8))
        other.zero_grad()
        nn.functional.cross_entropy(one(tokens).flatten(0, 1), tokens.flatten()).backward()
        other.step()
    for one, other in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_larger_model_goes_on_with_what_there_is(start):
    folder, before, optimizer = start
    inheritance, model, made = inherited(folder, LARGE)
    assert inheritance.changed
    tokens = torch.randint(0, 20, (2, 9))
    torch.testing.assert_close(model(tokens), before(tokens), atol=1e-5, rtol=0)
    assert inheritance.moments(made) == len(list(before.parameters()))
    old = optimizer.state[before.embedding.weight]
    new = made.state[model.embedding.weight]
    torch.testing.assert_close(new["exp_avg"][:, :16], old["exp_avg"])
    assert int(new["step"]) == 3
    assert model.blocks[1].mixer.out.weight not in made.state
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    made.step()  # parameters with and without moments, side by side
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_another_optimizer_begins_anew(start):
    inheritance, _, made = inherited(start[0], SMALL, {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0})
    assert inheritance.moments(made) == 0
    assert made.state == {}


def test_torn_weights_are_refused(start):
    folder = start[0]
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-3] + b"xyz")
    with pytest.raises(CheckpointError, match="it is corrupt"):
        inherited(folder, SMALL)


def test_weights_of_another_model_are_refused(start):
    with pytest.raises(ConfigError, match="are of another model"):
        inherited(start[0], {**SMALL, "vocab_size": 21}, workload=object())
