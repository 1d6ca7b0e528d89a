import fnmatch

import pytest
import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.models.low_rank import LowRankLinear, add_low_rank, merged


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.query = nn.Linear(6, 8, bias=False)
        self.out = nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x):
        return self.out(self.query(self.backbone(x)).relu())


def changed_net(targets=("*",), rank=2, dtype=torch.float32):
    """Add changes that change something."""
    net = add_low_rank(Net(dtype), rank=rank, alpha=4.0, targets=targets)
    for name, parameter in net.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    return net


def low_rank_layers(net):
    return {name for name, module in net.named_modules() if isinstance(module, LowRankLinear)}


def test_what_the_model_computes_and_its_names_stay_the_same_at_the_start():
    net, x = Net(), torch.randn(5, 6)
    before, names = net(x), set(net.state_dict())
    assert add_low_rank(net, rank=2, alpha=4.0, targets=["*"]) is net
    torch.testing.assert_close(net(x), before, atol=0, rtol=0)
    added = {f"{layer}.lora_{side}" for layer in ("query", "out") for side in "ab"}
    assert set(net.state_dict()) == names | added


def test_the_change_is_of_the_rank_and_the_size_asked_for():
    net, plain = changed_net(["query"]), Net()
    change = net.query.lora_b @ net.query.lora_a
    assert torch.linalg.matrix_rank(change) == 2
    x = torch.randn(4, 6)
    torch.testing.assert_close(net.query(x) - plain.query(x), 4.0 / 2 * x @ change.T)


def test_only_the_changes_get_gradients_when_the_rest_is_frozen():
    net = changed_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(fnmatch.fnmatch(name, "*lora_*"))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net(torch.randn(5, 6)).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"query.lora_a", "query.lora_b", "out.lora_a", "out.lora_b"}


def test_merged_layers_are_plain_and_compute_the_same():
    net, x = changed_net(), torch.randn(5, 6)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = merged(net)
    assert not low_rank_layers(plain)
    assert set(plain.state_dict()) == set(Net().state_dict())
    torch.testing.assert_close(plain(x), net(x))
    assert low_rank_layers(net) == {"query", "out"}
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def test_a_merged_copy_shares_all_other_memory_but_not_the_tensors():
    net = changed_net(["query"])
    plain = merged(net)
    assert plain.out.weight.data_ptr() == net.out.weight.data_ptr()
    assert plain.query.weight.data_ptr() != net.query.weight.data_ptr()
    plain.to("meta")
    assert net.out.weight.device.type == "cpu"


def test_layers_of_a_backbone_are_changed_only_where_it_is_named():
    assert low_rank_layers(changed_net(["*"])) == {"query", "out"}
    assert low_rank_layers(changed_net(["*", "backbone.*"])) == {"query", "out", "backbone.0"}


def test_layers_that_are_changed_already_stay_as_they_are():
    net, x = changed_net(["query"]), torch.randn(5, 6)
    layer, before = net.query, net(x)
    add_low_rank(net, rank=3, alpha=1.0, targets=["query"])
    assert net.query is layer
    torch.testing.assert_close(net(x), before, atol=0, rtol=0)


def test_a_layer_with_two_names_is_changed_once():
    net = Net()
    net.again = net.query
    add_low_rank(net, rank=2, alpha=4.0, targets=["query"])
    assert net.query.lora_a is not None
    assert type(net.again) is nn.Linear, "only the name that was asked for"
    net = Net()
    net.again = net.query
    add_low_rank(net, rank=2, alpha=4.0, targets=["*"])
    assert net.again is net.query


def test_changes_of_half_precision_weights_are_in_full_precision():
    net = changed_net(dtype=torch.bfloat16)
    assert {parameter.dtype for name, parameter in net.named_parameters() if "lora" in name} == {torch.float32}
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    assert net(x).dtype == torch.bfloat16
    plain = merged(net)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(plain(x), net(x), atol=0.1, rtol=0.05)


def test_the_same_seed_draws_the_same_changes():
    one, other = changed_net(), changed_net()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], atol=0, rtol=0)


def test_changes_on_tensors_without_memory_take_none():
    with torch.device("meta"):
        net = add_low_rank(Net(), rank=2, alpha=4.0, targets=["*"])
    assert all(parameter.is_meta for parameter in net.parameters())
    assert all(parameter.is_meta for parameter in merged(net).parameters())


def test_patterns_that_match_no_linear_layer_are_refused():
    with pytest.raises(ConfigError, match=r"lora_targets: expected patterns .* got \['q_proj'\]. .* backbone.0, query"):
        add_low_rank(Net(), rank=2, alpha=4.0, targets=["q_proj"])
    with pytest.raises(ConfigError, match="there are none"):
        add_low_rank(nn.Sequential(nn.GELU()), rank=2, alpha=4.0, targets=["*"])
