import pytest
import torch

from memfit.errors import ConfigError
from memfit.models.decoder_language import DecoderLanguageModel
from memfit.models.experts_language import ExpertsLanguageModel
from memfit.models.growth import become_backbone, grow
from memfit.models.language_settings import LanguageSettings, check_carried
from memfit.models.recurrent_language import RecurrentLanguageModel

VOCAB = 40
MODELS = {"recurrent": RecurrentLanguageModel, "decoder": DecoderLanguageModel}
SMALL = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "num_heads": 2}
LARGER = {
    "wider": {"d_model": 24, "num_heads": 3},
    "deeper": {"num_layers": 4},
    "wider and deeper": {"d_model": 32, "num_heads": 4, "num_layers": 3, "ff_width": 96},
    "inner units": {"ff_width": 128, "state_width": 48},
}


def build(name: str, seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = MODELS[name](LanguageSettings(**{"name": name, **SMALL, **changes}))
    with torch.no_grad():  # gains that were trained, so that a wrong scale shows
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def grown(small, name: str, **changes):
    large = build(name, seed=1, **changes)
    large.load_state_dict(grow(small.state_dict(), large, "weight"))
    return large


@pytest.mark.parametrize("change", LARGER)
@pytest.mark.parametrize("name", MODELS)
def test_a_grown_model_computes_what_the_small_one_did(name, change):
    small = build(name)
    large = grown(small, name, **LARGER[change])
    tokens = torch.randint(0, VOCAB, (3, 50))
    assert sum(p.numel() for p in large.parameters()) >= sum(p.numel() for p in small.parameters())
    torch.testing.assert_close(large(tokens), small(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_everything_new_is_trained_after_a_few_steps(name):
    small = build(name)
    large = grown(small, name, **LARGER["wider and deeper"])
    before = {key: parameter.clone() for key, parameter in large.named_parameters()}
    optimizer = torch.optim.SGD(large.parameters(), lr=1.0)
    tokens = torch.randint(0, VOCAB, (4, 20))
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(large(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    still = [key for key, parameter in large.named_parameters() if torch.equal(parameter, before[key])]
    assert still == []
    new_rows = large.blocks[2].mixer.out.weight
    assert new_rows.abs().max() > 0


def test_moments_stay_where_their_parameters_went():
    small, large = build("decoder"), build("decoder", d_model=32, num_heads=4)
    moments = {key: torch.rand_like(parameter) for key, parameter in small.named_parameters()}
    carried = grow(moments, large, "moment")
    squares = grow(moments, large, "square")
    key = "blocks.0.mixer.query.weight"
    torch.testing.assert_close(carried[key][:16, :16], moments[key])
    assert carried[key][16:].abs().max() == 0
    torch.testing.assert_close(squares[key][:16, :16], moments[key])
    assert float(squares[key][20, 20]) == pytest.approx(float(moments[key].mean()))
    assert carried.keys() == moments.keys()  # nothing is made up for parameters that are new


def test_moments_are_those_of_the_grown_model_s_gradients():
    """A gradient is a moment after one step: what the small model's would be must be what the large one's is."""
    small = build("decoder")
    large = grown(small, "decoder", d_model=32, num_heads=4)
    tokens = torch.randint(0, VOCAB, (2, 30))
    for model in (small, large):
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    gradients = {key: parameter.grad for key, parameter in small.named_parameters()}
    carried = grow(gradients, large, "moment")
    for key, parameter in large.named_parameters():
        where = tuple(slice(size) for size in gradients[key].shape)
        torch.testing.assert_close(carried[key][where], parameter.grad[where], atol=1e-6, rtol=1e-3)


def test_experts_grow_beside_a_backbone_that_stays():
    def experts(**changes):
        torch.manual_seed(1)
        settings = LanguageSettings(**{"name": "experts", "num_experts": 2, **SMALL, **changes})
        model = ExpertsLanguageModel(settings, build("decoder", seed=5))
        with torch.no_grad():
            model.out.weight.normal_()
            model.mixture.norm.weight.uniform_(0.5, 1.5)
        return model

    small, large = experts(), experts(d_model=32, num_heads=4, num_layers=3)
    large.load_state_dict(grow(small.state_dict(), large, "weight"))
    tokens = torch.randint(0, VOCAB, (2, 12))
    torch.testing.assert_close(large(tokens), small(tokens), atol=1e-5, rtol=0)


def test_a_model_becomes_the_backbone_of_experts():
    torch.manual_seed(0)
    backbone = build("decoder")
    experts = ExpertsLanguageModel(LanguageSettings(name="experts", num_experts=2, **SMALL), build("decoder", seed=5))
    experts.load_state_dict(become_backbone(backbone.state_dict(), experts, "weight"))
    tokens = torch.randint(0, VOCAB, (2, 12))
    torch.testing.assert_close(experts(tokens), backbone(tokens))
    assert become_backbone(backbone.state_dict(), experts, "moment") == {}


@pytest.mark.parametrize(
    ("before", "after", "setting"),
    [
        ({}, {"d_model": 8, "num_heads": 1}, "d_model"),
        ({}, {"num_layers": 1}, "num_layers"),
        ({}, {"d_model": 32}, "num_heads"),
        ({}, {"name": "recurrent"}, "name"),
        ({"lora_rank": 2}, {"lora_rank": 4}, "lora_rank"),
        ({"lora_rank": 2}, {"lora_rank": 2, "d_model": 32, "num_heads": 4}, "d_model"),
    ],
)
def test_what_weights_cannot_follow_is_refused(before, after, setting):
    small = LanguageSettings(**{"name": "decoder", **SMALL, **before})
    with pytest.raises(ConfigError, match=f"^{setting}: expected"):
        check_carried(small, LanguageSettings(**{"name": "decoder", **SMALL, **after}))


def test_growing_and_low_rank_changes_are_allowed():
    small = LanguageSettings(name="decoder", **SMALL)
    check_carried(small, LanguageSettings(**{"name": "decoder", **SMALL, **LARGER["wider and deeper"]}))
    check_carried(small, LanguageSettings(**{"name": "decoder", **SMALL, "lora_rank": 4}))
    check_carried(small, LanguageSettings(**{"name": "experts", **SMALL, "num_experts": 4}))
