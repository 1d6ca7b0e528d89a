import pytest
import torch

from memfit.errors import ConfigError
from memfit.models.tcn import TemporalBlock, TemporalConvNet, levels_to_cover, receptive_field


def test_a_block_reads_no_step_after_its_output():
    torch.manual_seed(0)
    block = TemporalBlock(2, 4, kernel_size=3, dilation=2, dropout=0.0)
    series = torch.randn(1, 2, 30)
    changed = series.clone()
    changed[:, :, 17:] += 1.0
    before, after = block(series), block(changed)
    torch.testing.assert_close(after[:, :, :17], before[:, :, :17], atol=0, rtol=0)
    assert not torch.allclose(after[:, :, 17:], before[:, :, 17:])


@pytest.mark.parametrize(("levels", "kernel_size"), [(1, 2), (2, 3), (3, 2), (3, 4)])
def test_the_last_step_sees_exactly_the_receptive_field(levels, kernel_size):
    torch.manual_seed(0)
    field = receptive_field(levels, kernel_size)
    net = TemporalConvNet(window=field, channels=16, levels=levels, kernel_size=kernel_size).double()
    window = torch.randn(1, field + 3, dtype=torch.float64, requires_grad=True)
    net(window).sum().backward()
    assert torch.nonzero(window.grad[0]).min().item() == 3


@pytest.mark.parametrize(("window", "levels"), [(5, 1), (6, 2), (500, 7), (509, 7), (510, 8)])
def test_the_fewest_levels_that_cover_the_window_are_taken(window, levels):
    assert levels_to_cover(window, 3) == levels


def test_too_few_levels_are_refused_with_the_number_that_would_do():
    with pytest.raises(ConfigError, match=r"sees 253 steps; tcn_window is 500\. Use 7 levels"):
        TemporalConvNet(window=500, channels=4, levels=6)


def test_a_kernel_of_one_tap_is_refused():
    with pytest.raises(ConfigError, match="at least 2 to look back"):
        TemporalConvNet(window=10, channels=4, kernel_size=1)


def test_weights_have_a_norm_and_a_direction():
    net = TemporalConvNet(window=5, channels=4)
    weight = net.blocks[0].first.conv.weight.detach().clone()
    net.blocks[0].first.conv.parametrizations.weight.original1.data *= 3.0
    torch.testing.assert_close(net.blocks[0].first.conv.weight, weight)
