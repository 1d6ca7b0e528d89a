"""One global batch over two processes: the update is that of one process with the whole batch."""

import multiprocessing
import os

import pytest
import torch
from torch import nn

from memfit.step import StepLayout, TrainingProgram, TrainingStep

SHARES = (5, 8)


def program() -> TrainingProgram:
    def loss(model, batch):
        errors = (model(batch["x"]) - batch["y"]).pow(2).squeeze(1)
        return {"error": (errors * batch["mask"]).sum(), "size": model(batch["x"]).abs().sum()}

    return TrainingProgram(
        build_model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        make_batch=lambda n, _seq_len: {},
        loss=loss,
        count=lambda batch: {"error": float(batch["mask"].sum()), "size": float(len(batch["x"]))},
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )


def batch(start: int, stop: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = sum(SHARES)
    whole = {
        "x": torch.randn(size, 3, generator=generator),
        "y": torch.randn(size, 1, generator=generator),
        "mask": (torch.rand(size, generator=generator) > 0.4).float(),
    }
    return {name: tensor[start:stop] for name, tensor in whole.items()}


def train(steps: int, start: int, stop: int, accumulation_steps: int) -> tuple[list[float], list[float], int]:
    torch.manual_seed(0)
    chosen = program()
    model = chosen.build()
    step = TrainingStep(StepLayout(accumulation_steps), chosen, model, chosen.optimizer(model), clip=1.0)
    stats = [step(batch(start, stop)) for _ in range(steps)][-1]
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return weights.tolist(), [*stats.losses.values(), stats.gradient_norm], stats.num_samples


def rank(number: int, meeting: str, answers) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=2)
    try:
        answers.put((number, train(3, *((0, 5) if number == 0 else (5, 13)), accumulation_steps=2 + number)))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_update_as_one_with_the_whole_global_batch(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    children = [context.Process(target=rank, args=(number, str(tmp_path / "meeting"), answers)) for number in (0, 1)]
    for child in children:
        child.start()
    found = dict(answers.get(timeout=120) for _ in children)
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    weights, numbers, size = train(3, 0, 13, accumulation_steps=4)
    for number in (0, 1):
        assert found[number][0] == pytest.approx(weights, rel=1e-5, abs=1e-7)
        assert found[number][1] == pytest.approx(numbers, rel=1e-5)
        assert found[number][2] == size == 13
