import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memfit.errors import ConfigError, DataError
from memfit.models.multiscale import BLOCKS, build_multiscale


def test_the_full_net_has_the_reference_number_of_parameters():
    with torch.device("meta"):
        net = build_multiscale(
            "full",
            windows=(50, 200, 500, 1000),
            tcn_window=500,
            transformer_window=1000,
            num_features=121,
            num_classes=8,
            value_mean=0.0,
            value_std=1.0,
            feature_mean=[0.0] * 121,
            feature_std=[1.0] * 121,
        )
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(9.8e6, rel=0.01)


def test_an_untrained_net_predicts_the_last_value_and_no_side(make_tiny, make_rows):
    net = make_tiny()
    history, features = make_rows(6)
    outputs = net(history, features)
    torch.testing.assert_close(net.denormalize(outputs["value"]), history[:, -1])
    assert outputs["exceeds_logit"].abs().max() < 0.5
    assert (outputs["class_logits"].softmax(-1) - 1 / 3).abs().max() < 0.15


def test_outputs_are_one_a_row(make_tiny, make_rows):
    shapes = {name: tuple(output.shape) for name, output in make_tiny()(*make_rows(4)).items()}
    assert shapes == {"value": (4,), "class_logits": (4, 3), "exceeds_logit": (4,)}


def test_units_do_not_matter_once_the_constants_know_them(make_tiny, make_rows):
    history, features = make_rows(4)
    celsius = make_tiny()
    fahrenheit = make_tiny(value_mean=40.0 * 1.8 + 32, value_std=8.0 * 1.8)
    expected, got = celsius(history, features), fahrenheit(history * 1.8 + 32, features)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


def test_only_the_longest_window_of_a_longer_history_is_read(make_tiny, make_rows):
    net = make_tiny()
    history, features = make_rows(4, length=40)
    for name, expected in net(history[:, -net.context :], features).items():
        torch.testing.assert_close(net(history, features)[name], expected)


def test_each_branch_reads_the_latest_steps_of_its_window(make_tiny, make_rows):
    net = make_tiny(windows=(8, 16, 24), tcn_window=8, transformer_window=16)
    seen = {}
    for name, branch in (*net.nbeats.items(), ("tcn", net.tcn), ("transformer", net.transformer)):
        branch.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0]}))
    history, features = make_rows(3, length=30)
    net(history, features)
    level = (history - 40) / 8
    expected = {str(window): level[:, -window:] - level[:, -1:] for window in (8, 16, 24)}
    expected |= {"tcn": level[:, -8:], "transformer": level[:, -16:]}
    assert seen.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(seen[name], expected[name])


@pytest.mark.parametrize("step", [0, 10, 23])
def test_every_step_of_the_window_counts(make_tiny, make_rows, step):
    net = make_tiny()
    history, features = make_rows(2)
    changed = history.clone()
    changed[:, step] += 4.0
    assert not torch.equal(net(history, features)["class_logits"], net(changed, features)["class_logits"])


def test_features_count(make_tiny, make_rows):
    net = make_tiny()
    history, features = make_rows(2)
    assert not torch.equal(net(history, features)["class_logits"], net(history, features + 1)["class_logits"])


@pytest.mark.parametrize(
    ("windows", "tcn_window", "transformer_window"),
    [((24,), None, None), ((8,), 8, None), ((8, 16, 24), None, 16), ([8, 24], 24, 24)],
)
def test_a_subset_of_windows_and_branches_trains(make_tiny, make_rows, windows, tcn_window, transformer_window):
    net = make_tiny(windows=windows, tcn_window=tcn_window, transformer_window=transformer_window)
    loss = sum(output.square().sum() for output in net(*make_rows(3)).values())
    loss.backward()
    untouched = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert untouched == []


def test_gradients_reach_every_module_within_two_steps(make_tiny, make_rows):
    net = make_tiny()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(*make_rows(8))["value"].square().mean().backward()
        optimizer.step()
    silent = {n.split(".")[0] for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"class_head", "exceeds_head"}


def test_bf16_autocast_keeps_single_precision_outputs_close(make_tiny, make_rows):
    net = make_tiny()
    torch.nn.init.normal_(net.value_head.weight, std=0.05)
    exact = net(*make_rows(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = net(*make_rows(8))
    for name in exact:
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], exact[name], atol=0.03, rtol=0.03)
    rounded["value"].sum().backward()


def test_large_values_keep_their_digits_under_bf16_autocast(make_tiny, make_rows):
    net = make_tiny(value_mean=1e4, value_std=1.0)
    history, features = make_rows(4)
    history = history + 1e4 - 40
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = net(history, features)["value"]
    torch.testing.assert_close(net.denormalize(value), history[:, -1], atol=2e-3, rtol=0)


def _training_gradients(net, rows):
    torch.manual_seed(7)
    outputs = net(*rows)
    sum(output.square().sum() for output in outputs.values()).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def test_a_step_is_deterministic(make_tiny, make_rows):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (_training_gradients(make_tiny(dropout=0.2), make_rows(8)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointing_the_blocks_changes_no_gradient(make_tiny, make_rows):
    expected = _training_gradients(make_tiny(dropout=0.2), make_rows(8))
    net = make_tiny(dropout=0.2)
    wrapped = [module for module in net.modules() if isinstance(module, BLOCKS)]
    for block in wrapped:
        block.forward = lambda x, forward=block.forward: checkpoint(forward, x, use_reentrant=False)
    got = _training_gradients(net, make_rows(8))
    assert {type(block) for block in wrapped} == set(BLOCKS)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_the_net_overfits_32_rows(make_tiny, make_rows):
    net = make_tiny()
    rows = make_rows(32)
    torch.manual_seed(1)
    value, classes, exceeds = torch.randn(32), torch.randint(3, (32,)), torch.randint(2, (32,)).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        outputs = net(*rows)
        loss = (
            F.mse_loss(outputs["value"], value)
            + F.cross_entropy(outputs["class_logits"], classes)
            + F.binary_cross_entropy_with_logits(outputs["exceeds_logit"], exceeds)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    assert torch.equal(net(*rows)["class_logits"].argmax(-1), classes)


def test_weights_saved_and_loaded_predict_the_same(make_tiny, make_rows):
    net, other = make_tiny(), make_tiny(value_mean=0.0, value_std=1.0)
    torch.nn.init.normal_(net.value_head.weight)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(*make_rows(4))["value"], net(*make_rows(4))["value"], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"windows": ()}, "windows must be one or more"),
        ({"windows": (24, 8)}, "rising; got"),
        ({"windows": (8, 8, 24)}, "rising; got"),
        ({"windows": (1, 8, 24)}, "at least 2 steps"),
        ({"tcn_window": 12}, r"tcn_window must be one of the windows \[8, 24\] or None; got 12"),
        ({"transformer_window": 1000}, "transformer_window must be one of the windows"),
        ({"tcn_window": 0}, "tcn_window must be one of the windows"),
        ({"d_model": 15}, "multiple of num_heads"),
        ({"tcn_window": 24, "tcn_levels": 1}, "Use 3 levels"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be"),
        ({"num_features": 6}, "as many as the normalization constants; got 6 and 5"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"d_modle": 16}, "no setting 'd_modle'; did you mean d_model?"),
    ],
)
def test_impossible_arguments_are_refused(make_tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_tiny(**overrides)


def test_an_unknown_size_and_missing_arguments_are_refused():
    with pytest.raises(ConfigError, match="one of full, light; got 'huge'"):
        build_multiscale("huge")
    with pytest.raises(ConfigError, match="also needs feature_mean, feature_std, num_classes"):
        build_multiscale("full")


def test_inputs_of_another_shape_are_refused(make_tiny, make_rows):
    history, features = make_rows(2)
    with pytest.raises(DataError, match=r"history must be \[n, 24\] or longer; got \[2, 23\]"):
        make_tiny()(history[:, 1:], features)
    with pytest.raises(DataError, match=r"features must be \[n, 5\]; got \[2, 4\]"):
        make_tiny()(history, features[:, 1:])
