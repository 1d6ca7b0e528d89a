import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from memfit.errors import ConfigError
from memfit.models.decoder_language import DecoderLanguageModel
from memfit.models.experts_language import ExpertMixture, ExpertsLanguageModel
from memfit.models.language_settings import LanguageSettings
from memfit.models.low_rank import add_low_rank

VOCAB, WIDTH = 31, 24
SIZES = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "num_heads": 2, "num_experts": 3, "expert_rank": 4}


def make_backbone(dtype=torch.float32):
    torch.manual_seed(1)
    settings = LanguageSettings(name="decoder", vocab_size=VOCAB, d_model=WIDTH, num_layers=1, num_heads=2, dropout=0.5)
    backbone = DecoderLanguageModel(settings)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.mul_(1 if "norm" in name else 10)
    return backbone.to(dtype)


def settings_of(**changes):
    return LanguageSettings(name="experts", **{**SIZES, **changes})


def make_model(*, dtype=torch.float32, started=True, **changes):
    """Build experts on a small decoder; `started`: with a correction, as after some steps."""
    torch.manual_seed(0)
    model = ExpertsLanguageModel(settings_of(**changes), make_backbone(dtype))
    if started:
        nn.init.normal_(model.out.weight, std=0.3)
        nn.init.normal_(model.mixture.router.weight, std=0.5)
    return model


def tokens_of(n, length=7):
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(n * length))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# The backbone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_begins_exactly_as_the_backbone(dtype):
    model, backbone, tokens = make_model(dtype=dtype, started=False), make_backbone(dtype).eval(), tokens_of(3)
    assert torch.equal(model(tokens), backbone(tokens))
    assert torch.equal(model.hidden(tokens), backbone.hidden(tokens).float())
    assert model(tokens).dtype == dtype


@pytest.mark.parametrize("num_experts", [1, 8])
def test_there_is_one_backbone_however_many_experts_there_are(tmp_path, num_experts):
    model, alone = make_model(num_experts=num_experts), make_backbone()
    size = sum(parameter.nbytes for parameter in alone.parameters())
    held = [p for name, p in model.named_parameters() if name.startswith("backbone.")]
    assert sum(parameter.nbytes for parameter in held) == size
    names = {name.removeprefix("backbone.") for name in model.state_dict() if name.startswith("backbone.")}
    assert names == set(alone.state_dict())
    save_file(model.state_dict(), tmp_path / "weights.safetensors")  # refuses tensors that share memory
    assert load_file(tmp_path / "weights.safetensors").keys() == model.state_dict().keys()


def test_the_backbone_is_frozen_and_in_evaluation_mode_in_training_too():
    model, tokens = make_model().train(), tokens_of(2)
    assert model.training
    assert model.mixture.training
    assert not any(module.training for module in model.backbone.modules())
    assert torch.equal(model(tokens), model(tokens)), "dropout of the backbone"
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)
    assert not any(name.startswith("backbone.") for name in trained(model))
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_the_backbone_keeps_no_activations():
    model, tokens, kept = make_model(), tokens_of(2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model.backbone(tokens)
        assert kept == []
        model(tokens)
        assert kept


def test_the_backbone_keeps_its_precision_under_autocast():
    model, seen = make_model(dtype=torch.float16), []
    model.backbone.blocks[0].ff.gate.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    model.mixture.down.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    model.blocks[1].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden(tokens_of(2))
    assert seen == [torch.float16, torch.bfloat16, torch.float32]
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, model.hidden(tokens_of(2)), atol=0.1, rtol=0.1)


def test_a_vocabulary_that_the_backbone_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size: expected at most the 31 tokens .* got 32"):
        make_model(vocab_size=VOCAB + 1)
    assert make_model(vocab_size=VOCAB - 1)(tokens_of(1)).shape[-1] == VOCAB - 1  # rounded up by the backbone


def test_low_rank_changes_of_the_backbone_are_trained_where_they_are_asked_for():
    model = add_low_rank(make_model(), rank=2, alpha=2.0, targets=["backbone.*.query"]).train()
    F.cross_entropy(model(tokens_of(2)).flatten(0, 1), tokens_of(2).flatten()).backward()
    with_gradients = {
        name for name, p in model.named_parameters() if name.startswith("backbone.") and p.grad is not None
    }
    assert with_gradients == {"backbone.blocks.0.mixer.query.lora_a", "backbone.blocks.0.mixer.query.lora_b"}
    assert model.backbone.blocks[0].mixer.query.lora_b.grad.abs().max() > 0


# The mixture


def by_hand(mixture: ExpertMixture, rows, rank):
    """Run every expert by itself on every token, and add up what the router chose."""
    rows = mixture.norm(rows)
    shares = (rows @ mixture.router.weight.T).softmax(dim=-1)
    total = torch.zeros(*rows.shape[:2], mixture.up.out_features)
    for sample in range(rows.shape[0]):
        for step in range(rows.shape[1]):
            chosen = shares[sample, step].argsort(descending=True)[: mixture.per_token or mixture.num_experts]
            for expert in chosen.tolist():
                part = slice(expert * rank, (expert + 1) * rank)
                inner = F.gelu(mixture.down.weight[part] @ rows[sample, step])
                gate = shares[sample, step, expert] / shares[sample, step, chosen].sum()
                total[sample, step] += gate * (mixture.up.weight[:, part] @ inner)
    return total, shares


@pytest.mark.parametrize("per_token", [None, 1, 2, 3])
def test_the_mixture_is_the_weighed_sum_of_each_experts_adapter(per_token):
    mixture, rows = make_model(experts_per_token=per_token).mixture, torch.randn(2, 5, WIDTH)
    nn.init.normal_(mixture.down.weight)
    nn.init.normal_(mixture.up.weight)
    mixed, shares = mixture(rows)
    expected, expected_shares = by_hand(mixture, rows, rank=4)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(shares, expected_shares)


@pytest.mark.parametrize(("per_token", "used"), [(None, 3), (1, 1), (2, 2)])
def test_the_gates_of_a_token_add_up_to_one(per_token, used):
    gates = make_model(experts_per_token=per_token).routing(tokens_of(4))
    assert gates.shape == (4, 7, 3)
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(4, 7))
    assert ((gates > 0).sum(dim=-1) == used).all()


def test_a_token_changes_no_row_before_it():
    model, tokens = make_model(), tokens_of(2, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    before, after = model.hidden(tokens), model.hidden(changed)
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=0, rtol=0)
    assert ((after[:, 5:] - before[:, 5:]).abs().amax(dim=-1) > 1e-4).all()


# Balance


def shares_of(rows):
    return torch.tensor(rows).unsqueeze(0)


def test_balance_is_one_where_experts_are_used_alike_and_their_number_where_one_is():
    mixture, mask = make_model().mixture, torch.ones(1, 3, dtype=torch.bool)
    alike = shares_of([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    torch.testing.assert_close(mixture.balance(alike, mask), torch.tensor([1.0]))
    one = shares_of([[1.0, 0.0, 0.0]] * 3)
    torch.testing.assert_close(mixture.balance(one, mask), torch.tensor([3.0]))


def test_balance_is_what_its_formula_says_with_two_experts_a_token():
    mixture = make_model(experts_per_token=2).mixture
    shares = shares_of([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    frequencies, means = torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.3, 0.25, 0.45])
    expected = 3 * (frequencies * means).sum()
    torch.testing.assert_close(mixture.balance(shares, torch.ones(1, 2, dtype=torch.bool)), expected[None])


def test_balance_is_of_each_sample_alone_and_of_the_tokens_that_count():
    model, tokens = make_model(experts_per_token=2), tokens_of(4)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 0])[:, None]
    hidden, balance = model.hidden_and_balance(tokens, mask)
    assert torch.equal(hidden, model.hidden(tokens))
    for sample, length in enumerate((7, 3, 5)):
        alone = model.hidden_and_balance(tokens[sample : sample + 1, :length], mask[sample : sample + 1, :length])[1]
        torch.testing.assert_close(balance[sample : sample + 1], alone)
    assert balance[3] == 0, "a sample without tokens that count"


def test_minimizing_balance_spreads_the_load():
    model, tokens, mask = make_model(), tokens_of(16), torch.ones(16, 7, dtype=torch.bool)
    with torch.no_grad():
        mean = model.mixture.norm(model.backbone.hidden(tokens)).mean(dim=(0, 1))
        model.mixture.router.weight[0] += 2 * mean / mean.square().sum()
    before = model.expert_loads(tokens, mask).max()
    optimizer = torch.optim.Adam(model.mixture.router.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model.hidden_and_balance(tokens, mask)[1].mean().backward()
        optimizer.step()
    loads = model.expert_loads(tokens, mask)
    assert before > 0.5
    assert loads.max() < 0.4
    torch.testing.assert_close(loads.sum(), torch.tensor(1.0))


def test_loads_leave_out_tokens_that_do_not_count():
    model, tokens = make_model(experts_per_token=1), tokens_of(2)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    assert model.expert_loads(tokens, mask).tolist() == [0, 0, 0]
    mask[1, 4] = True
    assert torch.equal(model.expert_loads(tokens, mask), model.routing(tokens)[1, 4])


# Training


def test_experts_learn_what_the_backbone_does_not_know():
    model, tokens = make_model(started=False).train(), tokens_of(4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_an_empty_model_runs_on_tensors_without_memory():
    with torch.device("meta"):
        model = ExpertsLanguageModel(settings_of(experts_per_token=2), make_backbone(torch.float16))
        tokens, mask = torch.zeros(4, 9, dtype=torch.long), torch.ones(4, 9, dtype=torch.bool)
        hidden, balance = model.hidden_and_balance(tokens, mask)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (hidden.shape, hidden.dtype, balance.shape) == ((4, 9, WIDTH), torch.float32, (4,))
