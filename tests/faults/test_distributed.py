"""Memory that runs out on one rank: all of them vote, and go on together."""

import multiprocessing
import os

import pytest
import torch

from memfit.recovery import RecoveringStep, UpdateInterruptedError
from memfit.step import StepLayout
from tests.memfit.test_step_distributed import batch, program

SHARES = ((0, 6), (6, 13))
STEPS, FAULT = 4, 3


def train(number: int, fault: str | None) -> tuple[list[float], list[str], int]:
    """Train a rank's share; rank 1 runs out of memory in the third step."""
    torch.manual_seed(0)
    made, changes = program(), []
    model = made.build()
    optimizer = made.optimizer(model)
    step = RecoveringStep(
        StepLayout(2), made, model, optimizer, on_change=lambda change: changes.append(change.message)
    )
    due: list[str] = []

    def run_out(*_: object) -> None:
        if due:
            raise MemoryError(due.pop())

    if fault == "gradients":
        model.register_forward_hook(run_out)
    else:
        optimizer.register_step_pre_hook(run_out)
    for number_of_step in range(1, STEPS + 1):
        if fault and number == 1 and number_of_step == FAULT:
            due.append("rank 1 has none left")
        step(batch(*SHARES[number]))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return weights.tolist(), changes, step.state.accumulation_steps


def rank(number: int, meeting: str, fault: str | None, answers) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=2)
    try:
        answers.put((number, train(number, fault)))
    except UpdateInterruptedError as error:
        answers.put((number, str(error)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def both(tmp_path):
    def run(fault: str | None) -> list:
        spawn = multiprocessing.get_context("spawn")
        answers = spawn.Queue()
        meeting = str(tmp_path / f"meeting-{fault}")
        processes = [spawn.Process(target=rank, args=(number, meeting, fault, answers)) for number in (0, 1)]
        for process in processes:
            process.start()
        found = dict(answers.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(30)
        return [found[0], found[1]]

    return run


def test_both_ranks_repeat_the_step_in_smaller_pieces(both):
    whole, faulted = both(None), both("gradients")
    for (weights, changes, _), (again, said, pieces) in zip(whole, faulted, strict=True):
        assert again == pytest.approx(weights, rel=1e-6)
        assert changes == []
        assert len(said) == 1
        assert pieces > 2
    assert "another rank" in faulted[0][1][0]
    assert "rank 1 has none left" in faulted[1][1][0]
    assert faulted[0][0] == faulted[1][0]


def test_an_update_that_runs_out_on_one_rank_ends_the_attempt_on_both(both):
    assert both("update") == ["memory ran out on another rank", "rank 1 has none left"]
