import pytest
import torch

from memfit.errors import ConfigError
from memfit.models.nbeats import NBeats, NBeatsBlock, seasonality_basis, trend_basis


def make_block(kind, **changes):
    return NBeatsBlock(kind, **({"window": 20, "horizon": 5, "hidden": 8, "size": 3} | changes))


def test_trend_basis_holds_the_powers_of_time():
    steps = torch.tensor([-1.0, 0.5])
    torch.testing.assert_close(trend_basis(steps, 2), torch.tensor([[1.0, 1.0], [-1.0, 0.5], [1.0, 0.25]]))


def test_seasonality_basis_turns_once_a_unit_of_time_per_harmonic():
    basis = seasonality_basis(torch.tensor([0.0, 0.25, 1.0]), 2)
    expected = [[1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(basis, torch.tensor(expected), atol=1e-5, rtol=0)


def expand(block, theta):
    return torch.cat((block.backcast[1](theta), block.forecast[1](theta)), dim=-1)


def test_a_trend_block_forecasts_the_polynomial_that_it_takes_away():
    line = expand(make_block("trend"), torch.tensor([[1.0, 2.0, 0.0, 0.0]]))
    steps = line.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, steps[0, 0].item()))


def test_a_seasonality_block_forecasts_the_next_turn_of_what_it_takes_away():
    season = expand(make_block("seasonality"), torch.randn(1, 6))
    torch.testing.assert_close(season[:, 20:], season[:, :5], atol=1e-5, rtol=0)


def test_each_block_sees_what_the_blocks_before_it_left():
    torch.manual_seed(0)
    net = NBeats(window=20, hidden=8, num_blocks=2, horizon=5)
    rest, forecasts = torch.randn(3, 20), []
    output = net(rest)
    for stack in net.stacks:
        partial = torch.zeros(3, 5)
        for block in stack:
            coefficients = block.trunk(rest)
            partial = partial + block.forecast(coefficients)
            if block.backcast is not None:
                rest = rest - block.backcast(coefficients)
        forecasts.append(partial)
    torch.testing.assert_close(output, torch.cat(forecasts, dim=-1))
    assert output.shape == (3, net.out_features)


def test_every_parameter_gets_a_gradient():
    net = NBeats(window=20, hidden=8, num_blocks=2)
    net(torch.randn(4, 20)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_window_takes_no_more_harmonics_than_half_its_length():
    net = NBeats(window=20, hidden=8, num_blocks=1, harmonics=32)
    assert net.stacks[1][0].forecast[0].out_features == 2 * 10


def test_an_unknown_stack_is_refused():
    with pytest.raises(ConfigError, match="trend, seasonality, generic; got 'wavelet'"):
        make_block("wavelet")
