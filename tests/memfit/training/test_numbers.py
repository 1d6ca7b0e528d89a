"""Where numbers go bad."""

import re

import pytest
import torch

from memfit.step import StepLayout, TrainingProgram, TrainingStep
from memfit.training.numbers import first_bad


class Root(torch.nn.Module):
    def forward(self, x):
        return x.sqrt()


def step_of(*layers: torch.nn.Module) -> TrainingStep:
    program = TrainingProgram(
        build_model=lambda: torch.nn.Sequential(*layers),
        make_batch=lambda n, seq_len=None: {"x": torch.randn(n, 4)},
        loss=lambda model, batch: model(batch["x"]).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )
    model = program.build()
    return TrainingStep(StepLayout(), program, model, program.optimizer(model))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.full((2, 4), -1.0), r"first in the output of '1' \(Root\)"),
        (torch.zeros(2, 4), r"first in gradients: of '0.bias' and 1 more"),
        (torch.ones(2, 4), "not seen again"),
    ],
)
def test_names_the_layer_or_else_the_gradient(batch, said):
    """The root of a negative number is none; that of zero is, and its slope is not."""
    linear = torch.nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
        linear.bias.zero_()
    step = step_of(linear, Root(), torch.nn.Identity())
    before = [value.clone() for value in step.model.state_dict().values()]
    found = first_bad(step, {"x": batch})
    assert re.search(said, found), found
    assert all(map(torch.equal, before, step.model.state_dict().values()))
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert not any(module._forward_hooks for module in step.model.modules())
