"""On a real card: budgets, probes, plans and estimates. Everything runs in children, which need no fixture of others.

Where pandas and pydantic are missing: `pytest -m gpu --noconftest tests/memfit/memory/test_on_cuda.py`.
"""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memfit
from memfit import chunked_loss
from memfit.memory import enforcement
from memfit.memory.plan import Candidate
from memfit.memory.probe import Prober
from memfit.process import is_out_of_memory, run_child
from memfit.step import StepLayout, TrainingProgram, TrainingStep, materialize_state, num_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB, GIB = 2**20, 2**30
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run a function of this file in a fresh process: `start("name", key=value)` is how it ended."""
    paths = [str(Path(__file__).parent), str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    def run(name, **payload):
        target = f"{Path(__file__).stem}:{name}"
        log = tmp_path / "child.log"
        return run_child(target, {"device": "cuda", **payload}, log=log, deadline_seconds=240.0)

    return run


@pytest.fixture
def child(start):
    """Run a function of this file in a fresh process, and take what it returns."""
    return lambda name, **payload: start(name, **payload).unwrap(name)


# What the children run; `device` is a parameter, so that all of it can be tried on a CPU.


class Wide(nn.Module):
    """A residual block that widens."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.layers(x)


def perceptron(width=512, depth=8):
    """About 160 KiB of activations per sample, and 270 MiB of state."""
    return TrainingProgram(
        build_model=lambda: nn.Sequential(*[Wide(width) for _ in range(depth)], nn.Linear(width, 1)),
        make_batch=lambda n, seq_len=None: {"x": torch.randn(n, width), "y": torch.randn(n, 1)},
        loss=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
        blocks=(Wide,),
    )


class Language(nn.Module):
    """A small Transformer over tokens."""

    def __init__(self, classes, width, layers):
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids)))


def transformer(classes=8192, width=512, layers=4, length=256):
    return TrainingProgram(
        build_model=lambda: Language(classes, width, layers),
        make_batch=lambda n, seq_len=None: torch.randint(classes, (n, length)),
        loss=lambda model, batch: F.cross_entropy(model(batch).flatten(0, 1), batch.flatten()),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
        blocks=(nn.TransformerEncoderLayer,),
    )


PROGRAMS = {"perceptron": perceptron, "transformer": transformer}


def fill(payload, _emit):
    """Take blocks until the budget refuses them, drop them, and show that the process still works."""
    device = payload["device"]
    enforcement.enforce_budget(payload["budget_bytes"], device)
    blocks, refused = [], ""
    for size in (64 * MIB, 2 * MIB):
        try:
            while len(blocks) < 4096:
                blocks.append(torch.ones(size // 4, device=device))
        except RuntimeError as error:
            refused = str(error) if is_out_of_memory(error) else f"something else: {error}"
    taken, peak = sum(block.nbytes for block in blocks), enforcement.peak_bytes(device)
    blocks.clear()
    again = float(torch.ones(64 * MIB // 4, device=device).sum())
    return {"taken": taken, "refused": refused, "again": again, "peak_bytes": peak}


def peaks(payload, _emit):
    """Measure the peak with a block held, and again after a reset without it."""
    device = payload["device"]
    held = torch.ones(256 * MIB // 4, device=device)
    high, now = enforcement.peak_bytes(device), enforcement.now_bytes(device)
    del held
    torch.cuda.empty_cache()
    enforcement.reset_peak(device)
    return {"high": high, "now": now, "low": enforcement.peak_bytes(device)}


def probes(payload, emit):
    """Probe a small micro-batch, and one of about 20 GiB."""
    device, limit = payload["device"], payload["budget_bytes"]
    enforcement.enforce_budget(limit, device)
    prober = Prober(perceptron(), device, limit, 2**18, 1.0, emit)
    return [asdict(prober(Candidate(size, 2**18 // size))) for size in (1024, 2**17)]


def exhaust(payload, _emit):
    """Ask for more than there is."""
    return len([torch.empty(2**40, device=payload["device"]) for _ in range(64)])


def plans(payload, _emit):
    """Be a user's process: plan, and say whether the plan touched the card from here."""
    asked = {key: payload[key] for key in ("device", "global_batch_size", "budget", "precisions")}
    plan = memfit.plan(PROGRAMS[payload["program"]](), **asked)
    return {
        "verified": plan.verified,
        "measured": plan.measured_peak_bytes,
        "predicted": plan.predicted_peak_bytes,
        "layout": [plan.micro_batch_size, plan.accumulation_steps, plan.precision, plan.checkpointing],
        "initialized": torch.cuda.is_initialized(),
    }


def predicts(payload, _emit):
    """Estimate a step's peak on the card that is here."""
    how = {key: payload[key] for key in ("device", "micro_batch_size", "precision", "checkpointing")}
    return memfit.estimate(PROGRAMS[payload["program"]](), **how).peak_bytes


def trains(payload, _emit):
    """Run steps of memfit; report the allocator's peak, the losses and what the scaler did."""
    device = payload["device"]
    program, (size, cut) = PROGRAMS[payload["program"]](), (payload["micro_batch_size"], payload.get("cut", 1))
    torch.manual_seed(0)
    model = program.build().to(device).train()
    optimizer = program.optimizer(model)
    materialize_state(model, optimizer)
    layout = StepLayout(cut, payload["precision"], payload["checkpointing"], device)
    step, batch = TrainingStep(layout, program, model, optimizer, clip=1.0), program.batch(size * cut)
    stats = [step(batch) for _ in range(payload.get("steps", 2))]
    return {
        "peak": torch.cuda.max_memory_reserved() if device == "cuda" else 0,
        "losses": [each.total for each in stats],
        "stepped": [each.stepped for each in stats],
        "num_samples": num_samples(batch),
    }


def overflows(payload, _emit):
    """Train in fp16 on a sample that overflows, then on one that does not."""
    device, program = payload["device"], perceptron(64, 1)
    model = program.build().to(device).train()
    step = TrainingStep(StepLayout(1, "fp16", "none", device), program, model, program.optimizer(model))
    before = [parameter.clone() for parameter in model.parameters()]
    bad = program.batch(256)
    bad["y"] += 1e30
    first = step(bad)
    kept = all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    second = step(program.batch(256))
    return {
        "stepped": [first.stepped, second.stepped],
        "scales": [first.loss_scale, second.loss_scale],
        "kept": kept,
        "moved": not all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)),
    }


def chunks(payload, _emit):
    """Take a large vocabulary's loss in one piece and in chunks, recomputed in the backward pass or not."""
    device, found = payload["device"], {}
    torch.manual_seed(0)
    hidden = torch.randn(4096, 256, device=device)
    weight = (0.05 * torch.randn(50_257, 256, device=device)).requires_grad_()
    target = torch.randint(50_257, (4096,), device=device)
    for name, on, recomputed in (("plain", False, False), ("chunked", True, False), ("recomputed", True, True)):
        weight.grad = None
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with chunked_loss.chunking(on):
            with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
                if recomputed:
                    loss = checkpoint(memfit.linear_cross_entropy, hidden, weight, target, use_reentrant=False)
                else:
                    loss = memfit.linear_cross_entropy(hidden, weight, target)
            (loss / 4).backward()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        found[name] = {"loss": float(loss.detach()), "norm": float(weight.grad.norm()), "peak": peak}
        del loss
    return found


def capability(_payload, _emit):
    return list(torch.cuda.get_device_capability())


# The tests.


def test_a_budget_is_kept(child):
    limit = 2 * GIB
    found = child("fill", budget_bytes=limit)
    assert "out of memory" in found["refused"]
    assert limit - 1100 * MIB < found["taken"] < limit, "the context is part of the budget"
    assert found["peak_bytes"] <= limit + 128 * MIB, "the context grows a little as kernels are loaded"
    assert found["again"] == 64 * MIB // 4


def test_a_peak_holds_the_context_and_is_started_anew(child):
    found = child("peaks")
    assert found["now"] >= 256 * MIB
    assert 256 * MIB + 32 * MIB < found["high"] < 256 * MIB + 2 * GIB
    assert found["low"] <= found["high"] - 255 * MIB


def test_a_probe_fits_or_runs_out_and_the_child_lives_on(child):
    small, large = child("probes", budget_bytes=3 * GIB)
    assert (small["outcome"], large["outcome"]) == ("fits", "oom")
    assert 300 * MIB < small["peak_bytes"] <= 3 * GIB
    assert small["micro_seconds"] > 0
    assert (large["phase"], large["peak_bytes"]) == ("train_step", None)
    assert "out of memory" in large["message"]


def test_running_out_of_memory_in_a_child_is_an_outcome(start):
    outcome = start("exhaust")
    assert (outcome.status, outcome.error) == ("oom", "OutOfMemoryError")


def test_a_plan_is_verified_within_its_budget_and_the_parent_never_touches_the_card(child):
    pytest.importorskip("cloudpickle")
    size, limit = 16384, 2 * GIB  # in one piece it would be 3 GiB and the context
    plan = child("plans", program="perceptron", global_batch_size=size, budget="2GiB", precisions=["fp32"])
    assert plan["verified"]
    assert 300 * MIB < plan["measured"] <= limit
    micro, cut, _, checkpointing = plan["layout"]
    assert micro * cut >= size
    assert cut > 1 or checkpointing == "blocks"
    assert abs(plan["predicted"] / plan["measured"] - 1) < 0.3
    assert not plan["initialized"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("program", "micro_batch_size"), [("perceptron", 8192), ("transformer", 32)])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_an_estimate_is_within_15_percent(child, program, micro_batch_size, precision, checkpointing):
    how = {"program": program, "micro_batch_size": micro_batch_size, "precision": precision}
    predicted = child("predicts", checkpointing=checkpointing, **how)
    measured = child("trains", checkpointing=checkpointing, **how)["peak"]
    assert abs(predicted / measured - 1) < 0.15, f"predicted {predicted / MIB:.0f}, measured {measured / MIB:.0f} MiB"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_of_lower_precision_learn_what_full_precision_learns(child, precision):
    if precision == "bf16" and child("capability") < [8, 0]:
        pytest.skip("this card has no bf16")
    how = {"program": "transformer", "micro_batch_size": 4, "cut": 2, "checkpointing": "none", "steps": 6}
    full, lower = child("trains", precision="fp32", **how), child("trains", precision=precision, **how)
    assert all(full["stepped"])
    assert lower["stepped"][-1]
    assert lower["losses"][-1] < lower["losses"][0]
    assert lower["losses"][0] == pytest.approx(full["losses"][0], rel=2e-2)


def test_the_cut_of_a_batch_does_not_change_the_training(child):
    how = {"program": "perceptron", "precision": "fp32", "checkpointing": "none", "steps": 3}
    whole, cut = child("trains", micro_batch_size=64, **how), child("trains", micro_batch_size=16, cut=4, **how)
    assert whole["num_samples"] == cut["num_samples"]
    assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-3)


def test_an_overflow_in_fp16_skips_the_update_and_halves_the_scale(child):
    found = child("overflows")
    assert found["stepped"] == [False, True]
    assert found["kept"]
    assert found["moved"]
    assert found["scales"] == [2.0**15, 2.0**15]


def test_a_loss_in_chunks_takes_less_and_is_recomputed_by_autograds_own_thread(child):
    found = child("chunks")
    plain = found["plain"]
    for name in ("chunked", "recomputed"):
        assert found[name]["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert found[name]["norm"] == pytest.approx(plain["norm"], rel=1e-2)
        assert found[name]["peak"] < plain["peak"] / 2


def test_the_benchmark_of_estimates_runs_a_case(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_estimates", "--only", "mlp/*/fp32/sgd/none", "--csv", "rows.csv"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
        )
        assert done.returncode == 0, done.stderr
        assert "1 cases: median error" in done.stdout
    assert len((tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()) == 2
