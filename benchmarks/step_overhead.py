"""How much the one step costs over a hand-written accumulation loop: medians of interleaved runs, as a ratio."""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from memfit.step import StepLayout, TrainingProgram, TrainingStep, split_samples


def model(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))


def with_memfit(width: int, layout: StepLayout) -> Callable[[dict[str, torch.Tensor]], object]:
    program = TrainingProgram(
        variants={"only": lambda: model(width)},
        make_batch=lambda n, _seq_len: {"x": torch.randn(n, width), "y": torch.randn(n, 1)},
        loss=lambda net, batch: {"mse": ((net(batch["x"]) - batch["y"]) ** 2).sum()},
        optimizer=lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3),
    )
    net = program.build()
    return TrainingStep(layout, program, net, program.optimizer(net), clip=1.0)


def by_hand(width: int, layout: StepLayout) -> Callable[[dict[str, torch.Tensor]], object]:
    net = model(width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step(batch: dict[str, torch.Tensor]) -> float:
        size, losses = len(batch["x"]), []
        for part in split_samples(batch, [size // layout.accumulation_steps] * layout.accumulation_steps):
            loss = ((net(part["x"]) - part["y"]) ** 2).sum() / size
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(sum(losses))

    return step


def measure(width: int, layout: StepLayout, rounds: int) -> tuple[float, float]:
    batch = {"x": torch.randn(64, width), "y": torch.randn(64, 1)}
    steps = (with_memfit(width, layout), by_hand(width, layout))
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds + 3):
        for step, times in zip(steps, seconds, strict=True):
            started = time.perf_counter()
            step(batch)
            if index >= 3:
                times.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--csv", type=Path, default=None, help="append the rows here")
    options = parser.parse_args()
    rows = []
    for width in (64, 512, 1024):
        for accumulation_steps in (1, 4, 16):
            ours, plain = measure(width, StepLayout(accumulation_steps), options.rounds)
            rows.append([width, accumulation_steps, f"{ours / plain:.3f}", f"{plain * 1e3:.3f}"])
            print(f"width {width:5d}, {accumulation_steps:2d} micro-steps: memfit / by hand = {ours / plain:.3f}")
    if options.csv:
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as opened:
            writer = csv.writer(opened)
            if new:
                writer.writerow(
                    ["date", "commit", "device", "torch", "width", "accumulation_steps", "ratio", "by_hand_ms"]
                )
            stamp = [datetime.now(UTC).date().isoformat(), commit(), f"{platform.machine()} cpu", torch.__version__]
            writer.writerows([*stamp, *row] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
