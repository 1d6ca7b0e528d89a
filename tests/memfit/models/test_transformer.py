import pytest
import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.models.transformer import EncoderLayer, SelfAttention, TransformerEncoder, sinusoidal_positions


def make_layer(dropout=0.0, attention_dropout=0.0):
    return EncoderLayer(d_model=16, num_heads=4, ff=32, dropout=dropout, attention_dropout=attention_dropout)


def test_a_layer_agrees_with_the_pre_norm_layer_of_torch():
    torch.manual_seed(0)
    layer = make_layer()
    reference = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    pairs = {
        "self_attn.in_proj_": layer.attention.project_in,
        "self_attn.out_proj.": layer.attention.project_out,
        "linear1.": layer.ff[0],
        "linear2.": layer.ff[3],
        "norm1.": layer.attention_norm,
        "norm2.": layer.ff_norm,
    }
    weights = {f"{name}{part}": getattr(ours, part) for name, ours in pairs.items() for part in ("weight", "bias")}
    reference.load_state_dict(weights)
    tokens = torch.randn(3, 10, 16)
    torch.testing.assert_close(layer(tokens), reference(tokens))


def test_attention_weights_are_dropped_in_training_only():
    torch.manual_seed(0)
    attention = SelfAttention(d_model=16, num_heads=4, dropout=0.5)
    tokens = torch.randn(2, 10, 16)
    assert not torch.allclose(attention(tokens), attention(tokens))
    attention.eval()
    torch.testing.assert_close(attention(tokens), attention(tokens), atol=0, rtol=0)


def test_dropout_of_tokens_and_of_attention_are_set_apart():
    layer = make_layer(dropout=0.3, attention_dropout=0.1)
    assert layer.attention.dropout == 0.1
    assert {part.p for part in layer.modules() if isinstance(part, nn.Dropout)} == {0.3}


def test_positions_are_sines_and_cosines_of_falling_rates():
    positions = sinusoidal_positions(3, 4)
    step = torch.tensor(2.0)
    expected = torch.stack((step.sin(), step.cos(), (step / 100).sin(), (step / 100).cos()))
    torch.testing.assert_close(positions[2], expected)
    assert positions[0].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_the_order_of_the_steps_matters():
    torch.manual_seed(0)
    encoder = TransformerEncoder(window=12, d_model=16, num_layers=1, num_heads=4, ff=32)
    window = torch.randn(2, 12)
    shuffled = window[:, [3, 1, 2, 0, *range(4, 12)]]
    assert not torch.allclose(encoder(window)[:, 16:], encoder(shuffled)[:, 16:], atol=1e-4)
    assert encoder(window).shape == (2, encoder.out_features)


def test_impossible_widths_are_refused():
    with pytest.raises(ConfigError, match="multiple of num_heads; got d_model 10 and num_heads 4"):
        SelfAttention(d_model=10, num_heads=4, dropout=0.0)
    with pytest.raises(ConfigError, match="must be even"):
        sinusoidal_positions(4, 5)
