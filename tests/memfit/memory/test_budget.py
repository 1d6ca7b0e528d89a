"""Budgets: what they come to on a device, and that a child really keeps to them."""

import os
from pathlib import Path

import pytest
import torch

from memfit.errors import ChildOutOfMemoryError, ConfigError, DoesNotFitError, ExportError
from memfit.memory import budget, enforcement
from memfit.memory.budget import resolve_budget
from memfit.memory.devices import Device
from memfit.memory.host import Memory
from memfit.process import run_child

MIB, GIB = 2**20, 2**30


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(budget, "device_memory", lambda _device: Memory(8 * GIB, 3 * GIB))


@pytest.mark.parametrize(
    ("text", "expected"), [("50%", 4 * GIB), ("12.5 %", GIB), ("100%", 8 * GIB), ("2GiB", 2 * GIB)]
)
def test_a_share_is_of_the_devices_total(machine, text, expected):
    assert resolve_budget(text, "cpu") == expected


def test_auto_is_what_is_free_less_a_margin(machine):
    assert resolve_budget("auto", "cpu") == 3 * GIB - budget.MARGIN_BYTES


def test_auto_is_never_nothing(monkeypatch):
    monkeypatch.setattr(budget, "device_memory", lambda _device: Memory(GIB, -5))
    assert resolve_budget("auto", "cpu") > 0


@pytest.mark.parametrize(("margin_bytes", "expected"), [(0, 3 * GIB), (GIB, 2 * GIB)])
def test_the_margin_is_the_users(machine, margin_bytes, expected):
    assert resolve_budget("auto", "cpu", margin_bytes) == expected


def test_refuses_a_negative_margin(machine):
    with pytest.raises(ConfigError, match="margin: expected 0 bytes or more, got -1"):
        resolve_budget("auto", "cpu", -1)


@pytest.mark.parametrize(
    "text", ["0%", "101%", "-5%", "%", "five%", "Auto", "all", "nan", "inf", "nan%", "-1GiB", "0B"]
)
@pytest.mark.parametrize("device", ["cpu", "t4"])
def test_refuses_shares_and_words_that_mean_nothing(machine, text, device):
    with pytest.raises(ConfigError, match="budget: expected"):
        resolve_budget(text, device)


T4_BYTES = 15828320256


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", T4_BYTES - 512 * MIB), ("80%", T4_BYTES * 8 // 10), ("100%", T4_BYTES), ("14GiB", 14 * GIB)],
)
def test_a_card_of_the_catalog_counts_as_empty(text, expected):
    assert resolve_budget(text, "t4") == expected


def test_a_users_own_card_has_budgets_too():
    card = Device.from_mapping({"name": "card", "memory": "24GiB", "compute_capability": "8.6"})
    assert resolve_budget("50%", "card", user_devices=[card]) == 12 * GIB
    with pytest.raises(ConfigError, match="'card' is not known"):
        resolve_budget("50%", "card")


def test_refuses_more_than_a_card_of_the_catalog_has():
    with pytest.raises(ConfigError, match=r"at most the 14\.74 GiB of 't4', got '16GiB'"):
        resolve_budget("16GiB", "t4")


def test_bytes_need_no_look_at_the_device(monkeypatch):
    monkeypatch.setattr(budget, "device_memory", None)
    assert resolve_budget("2GiB", "cuda:7") == 2 * GIB


SMI = """#!/bin/sh
[ "$1 $2" = "-i GPU-7" ] || exit 6
printf '100, 1024\n{own}, 300\n[N/A], [N/A]\n  200 ,  5 \n'
"""


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Put a program of that name on the path that knows the card GPU-7."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(own=os.getpid()), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return program


def test_lists_what_other_processes_hold_on_a_card(monkeypatch, nvidia_smi):
    monkeypatch.setattr(budget, "_card_uuid", lambda _device: "GPU-7")
    assert budget.other_processes("cuda") == [(100, 1024 * MIB), (200, 5 * MIB)]


def test_the_list_of_other_processes_is_empty_where_nobody_can_tell(monkeypatch, nvidia_smi):
    assert budget.other_processes("cpu") == []
    monkeypatch.setattr(budget, "_card_uuid", lambda _device: "MIG-1")
    assert budget.other_processes("cuda") == []
    nvidia_smi.unlink()
    assert budget.other_processes("cuda") == []


def test_measures_this_machine():
    memory = budget.device_memory("cpu")
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 0 < enforcement.now_bytes("cpu") <= enforcement.peak_bytes("cpu") < memory.total_bytes


@pytest.mark.parametrize("device", ["tpu9", "mps", "meta", "cpu:x"])
def test_refuses_devices_of_another_kind(device):
    with pytest.raises(ConfigError, match="device: expected 'cpu', 'cuda' or 'cuda:n'"):
        budget.check_device(device)


def test_refuses_rocm_which_torch_calls_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ConfigError, match="ROCm"):
        budget.check_device("cuda")


def test_never_falls_back_to_another_device():
    absent = f"cuda:{torch.cuda.device_count() + 3}"
    with pytest.raises(ConfigError, match="is not here"):
        budget.check_device(absent)
    assert budget.check_device("cpu") == "cpu"


@pytest.fixture
def target(importable):
    return importable(Path(__file__).with_name("budget_targets.py"))


def fill(tmp_path, target, budget_bytes: int, model: str = "dense", lazy_bytes: int = 0) -> dict:
    payload = {"budget_bytes": budget_bytes, "model": model, "lazy_bytes": lazy_bytes}
    return run_child(f"{target}:fill", payload, log=tmp_path / "log").unwrap("filling")


@pytest.mark.parametrize(
    ("mib", "model", "threads"),
    [(560, "dense", 1), (560, "convolution", 2), (800, "attention", 8), (1200, "dense", 2)],
)
def test_an_enforced_budget_refuses_memory_and_leaves_the_process_usable(
    tmp_path, monkeypatch, target, mib, model, threads
):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(threads))
    result = fill(tmp_path, target, mib * MIB, model)
    assert "can't allocate memory" in result["refused"]
    assert result["again"] == 16 * MIB
    assert 0.97 * mib * MIB < result["peak_bytes"] <= 1.005 * mib * MIB
    assert result["taken"] >= (mib - 350) * MIB


def test_memory_that_a_program_has_mapped_and_will_touch_counts(tmp_path, target):
    result = fill(tmp_path, target, 800 * MIB, lazy_bytes=256 * MIB)
    assert 0.97 * 800 * MIB < result["peak_bytes"] <= 1.005 * 800 * MIB
    assert result["taken"] <= 350 * MIB


def test_what_the_limit_leaves_out_and_what_it_counts_make_the_budget(monkeypatch):
    limits = []
    monkeypatch.setattr(enforcement.resource, "setrlimit", lambda _kind, limit: limits.append(limit[0]))
    monkeypatch.setattr(enforcement, "_uncounted_bytes", lambda: 100 * MIB)  # of this process: the tests' before it
    assert enforcement.enforce_budget(8 * GIB, "cpu") == 100 * MIB
    enforcement.enforce_budget(MIB, "cpu")
    assert limits == [8 * GIB - 100 * MIB, 1]


@pytest.fixture
def unlimited(monkeypatch):
    monkeypatch.setattr(enforcement, "enforce_budget", lambda *_: None)


def test_a_shortage_names_the_step_the_phase_and_the_cure(unlimited):
    events = []
    phases = enforcement.Phases("export", events.append)

    def run_out() -> None:
        with enforcement.within_budget(64 * GIB, "cpu", phases, "Do this."):
            phases("graph")
            raise MemoryError

    with pytest.raises(
        ChildOutOfMemoryError,
        match=r"^export: .* 65536 MiB on cpu, ran out in phase 'graph': MemoryError\. Do this\.$",
    ):
        run_out()
    assert events == [{"event": "phase", "phase": "graph"}]


@pytest.mark.parametrize(
    "cause", [MemoryError("x"), OSError(12, "x"), Exception("[ONNXRuntimeError] : 6 : std::bad_alloc")]
)
def test_a_shortage_is_found_behind_what_was_raised_from_it(unlimited, cause):
    with (
        pytest.raises(ChildOutOfMemoryError, match=type(cause).__name__),
        enforcement.within_budget(64 * GIB, "cpu", enforcement.Phases("export", print), ""),
    ):
        raise ExportError("the trace froze a dimension") from cause


def test_other_errors_pass_unchanged(unlimited):
    with (
        pytest.raises(ExportError, match="differs"),
        enforcement.within_budget(64 * GIB, "cpu", enforcement.Phases("export", print), ""),
    ):
        raise ExportError("differs") from ValueError("bad")


def test_a_budget_below_what_the_process_holds_is_refused_before_any_work(unlimited):
    with (
        pytest.raises(DoesNotFitError, match=r"export: expected a budget above the .* got 1 MiB\. Raise it\."),
        enforcement.within_budget(MIB, "cpu", enforcement.Phases("export", print), "Raise it."),
    ):
        pytest.fail("begun")


def test_a_batchs_bytes_on_the_host_are_those_of_its_own():
    base, dataset = torch.zeros(10, 4), torch.zeros(1000, 4)
    shared = {"x": base[:5], "y": [base[5:], base[:2]]}
    assert enforcement.host_bytes(shared) == 160
    elsewhere = {"view": dataset[:10], "meta": torch.empty(9, device="meta"), "word": "x"}
    assert enforcement.host_bytes(elsewhere) == 0
    assert enforcement.host_bytes([shared, elsewhere, torch.zeros(3, dtype=torch.int64)]) == 160 + 24


def test_the_rest_of_a_global_batch_is_really_held():
    batch = {"x": torch.zeros(6, 2**18), "y": torch.zeros(6, 4)}
    rest = enforcement.rest_of_batch(batch, 64)
    assert rest.nbytes + enforcement.host_bytes(batch) == 64 * (2**18 + 4) * 4
    assert rest.sum() == rest.numel()  # written: its pages are resident
    assert enforcement.rest_of_batch(batch, 6).nbytes == enforcement.rest_of_batch(batch, 2).nbytes == 0


def test_the_peak_can_be_reset(tmp_path, target):
    result = run_child(f"{target}:peaks", {}, log=tmp_path / "log").unwrap("peaks")
    assert min(result["high"], result["now"]) >= 256 * MIB
    assert result["low"] < result["high"] - 200 * MIB


def test_a_budget_is_resolved_in_a_child_too(tmp_path):
    outcome = run_child(
        "memfit.memory.budget:resolve_in_child", {"budget": "3GiB", "device": "cpu"}, log=tmp_path / "log"
    )
    assert outcome.unwrap("resolving") == 3 * GIB


def test_a_child_takes_the_margin_too(monkeypatch):
    monkeypatch.setattr(budget, "device_memory", lambda _device: Memory(8 * GIB, 3 * GIB))
    payload = {"budget": "auto", "device": "cpu", "margin_bytes": GIB}
    assert budget.resolve_in_child(payload, None) == 2 * GIB
