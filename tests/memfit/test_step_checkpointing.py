"""Activation checkpointing: the same gradients to the last bit, for less memory."""

import pytest
import torch
from torch import nn

from memfit.step import StepLayout, TrainingProgram, TrainingStep, checkpoint_blocks


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 8))

    def forward(self, x):
        return x + self.inner(x)


class Net(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(dropout) for _ in range(4)])
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.blocks(x)).squeeze(-1)


def program(dropout: float) -> TrainingProgram:
    return TrainingProgram(
        variants={"only": lambda: Net(dropout)},
        make_batch=lambda n, _seq_len: batch(n),
        loss=lambda model, part: ((model(part["x"]) - part["y"]) ** 2).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        blocks=(Block,),
    )


def batch(n: int = 13):
    random = torch.Generator().manual_seed(0)
    return {"x": torch.randn(n, 8, generator=random), "y": torch.randn(n, generator=random)}


def trained(checkpointing: str, *, dropout: float, precision: str = "fp32", steps: int = 3):
    """Train a few steps from one seed; return weights, losses, and the bytes kept for the backward pass."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    torch.manual_seed(5)
    chosen = program(dropout)
    model = chosen.build()
    step = TrainingStep(StepLayout(4, precision, checkpointing), chosen, model, chosen.optimizer(model))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = [step(batch()).total for _ in range(steps)]
    return model.state_dict(), losses, sum(kept), torch.get_rng_state()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gives_bit_identical_training_for_less_memory(dropout, precision):
    plain, plain_losses, plain_bytes, plain_random = trained("none", dropout=dropout, precision=precision)
    weights, losses, kept, random = trained("blocks", dropout=dropout, precision=precision)
    assert losses == plain_losses
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    assert torch.equal(random, plain_random)
    assert kept < plain_bytes / 3


def test_recomputes_only_while_training():
    net, calls = Net(0.0), []
    net.blocks[0].inner[0].register_forward_hook(lambda *_: calls.append(1))
    checkpoint_blocks(net, (Block,))
    net(batch()["x"]).sum().backward()
    assert len(calls) == 2
    calls.clear()
    net.eval()
    with torch.no_grad():
        net(batch()["x"])
    net.eval()(batch()["x"]).sum().backward()
    assert len(calls) == 2


def test_wrapping_twice_changes_nothing_and_names_stay():
    net, calls = Net(0.0), []
    names = list(net.state_dict())
    net.blocks[0].inner[0].register_forward_hook(lambda *_: calls.append(1))
    checkpoint_blocks(net, (Block,))
    checkpoint_blocks(net, (Block,))
    net(batch()["x"]).sum().backward()
    assert len(calls) == 2
    assert list(net.state_dict()) == names


class Normalized(nn.Module):
    """torch's own batch normalization, by exponential average or over all batches."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_statistics_count_every_batch_once(momentum):
    ended = []
    for checkpointing in ("none", "blocks"):
        torch.manual_seed(5)
        chosen = TrainingProgram(
            variants={"only": lambda: nn.Sequential(Normalized(momentum), Normalized(momentum), nn.Linear(8, 1))},
            make_batch=lambda n, _seq_len: batch(n),
            loss=lambda model, part: ((model(part["x"]).squeeze(1) - part["y"]) ** 2).mean(),
            optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            blocks=(Normalized,),
        )
        model = chosen.build()
        step = TrainingStep(StepLayout(2, checkpointing=checkpointing), chosen, model, chosen.optimizer(model))
        for _ in range(3):
            step(batch(12))
        ended.append(model.state_dict())
    assert int(ended[0]["0.inner.1.num_batches_tracked"]) == 6
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_no_part_of_a_smaller_last_batch_is_below_the_minimum():
    sizes = []
    chosen = TrainingProgram(
        variants={"only": lambda: nn.Linear(8, 1)},
        make_batch=lambda n, _seq_len: batch(n),
        loss=lambda model, part: (
            sizes.append(len(part["x"])) or ((model(part["x"]).squeeze(1) - part["y"]) ** 2).mean()
        ),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        min_micro_batch_size=4,
    )
    model = chosen.build()
    step = TrainingStep(StepLayout(4), chosen, model, chosen.optimizer(model))
    for size in (16, 9, 3):
        step(batch(size))
    assert sizes == [4, 4, 4, 4, 5, 4, 3]
