"""Budgets: what users may write, what containers allow, and that a child really keeps to it."""

from pathlib import Path

import pytest
import torch

from memfit.errors import ConfigError
from memfit.memory import budget
from memfit.memory.budget import Memory, parse_bytes, resolve_budget
from memfit.process import run_child

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("14GiB", 14 * GIB),
        ("512 MiB", 512 * MIB),
        (" 1.5GiB ", 1536 * MIB),
        ("2GB", 2_000_000_000),
        ("1KiB", 1024),
        ("3TB", 3 * 10**12),
        ("7B", 7),
    ],
)
def test_reads_amounts_with_their_unit(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "14", "GiB", "14gib", "14 Gib", "-1GiB", "1,5GiB", "1e3MiB", "14GiBs", "14G", "0GiB", "inf", "nanGiB"]
)
def test_refuses_amounts_that_could_be_misread(text):
    with pytest.raises(ConfigError, match=r"budget: expected .*, got "):
        parse_bytes(text)


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


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "%", "five%", "Auto", "all"])
def test_refuses_shares_and_words_that_mean_nothing(machine, text):
    with pytest.raises(ConfigError, match="budget: expected"):
        resolve_budget(text, "cpu")


def cgroups(tmp_path: Path, lines: str, files: dict[str, str]) -> tuple[int, int]:
    own = tmp_path / "own"
    own.write_text(lines, encoding="utf-8")
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return budget._cgroup(tmp_path / "root", own)


def test_v2_takes_the_tightest_limit_from_the_group_up_to_the_root(tmp_path):
    found = cgroups(
        tmp_path,
        "0::/user/job\n",
        {
            "user/job/memory.max": "max\n",
            "user/job/memory.current": "100\n",
            "user/memory.max": "3000\n",
            "user/memory.current": "1200\n",
            "memory.max": "9000\n",
            "memory.current": "1500\n",
        },
    )
    assert found == (3000, 1200)


def test_v1_reads_the_memory_controllers_own_tree(tmp_path):
    found = cgroups(
        tmp_path,
        "5:cpu,cpuacct:/other\n4:memory:/job\n0::/ignored\n",
        {
            "memory/job/memory.limit_in_bytes": "4000\n",
            "memory/job/memory.usage_in_bytes": "1000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "77\n",
            "memory/other/memory.limit_in_bytes": "1\n",
            "memory/other/memory.usage_in_bytes": "1\n",
        },
    )
    assert found == (4000, 1000)


def test_a_container_sees_its_own_group_at_the_mount_root(tmp_path):
    files = {"memory/memory.limit_in_bytes": "5000\n", "memory/memory.usage_in_bytes": "600\n"}
    assert cgroups(tmp_path, "4:memory:/docker/0123abc\n", files) == (5000, 600)


@pytest.mark.parametrize("key", ["inactive_file", "total_inactive_file"])
def test_file_cache_does_not_count_as_used(tmp_path, key):
    files = {"memory.max": "5000\n", "memory.current": "4500\n", "memory.stat": f"anon 500\n{key} 3900\nshmem 0\n"}
    assert cgroups(tmp_path, "0::/\n", files) == (5000, 600)


def test_no_limit_is_none(tmp_path):
    limit, used = cgroups(tmp_path, "0::/\n", {"memory.max": "max\n", "memory.current": "5\n"})
    assert limit >= 2**62
    assert used == 0


def test_a_cpu_has_no_more_than_its_container_allows(monkeypatch):
    monkeypatch.setattr(budget, "_meminfo", lambda: Memory(64 * GIB, 40 * GIB))
    monkeypatch.setattr(budget, "_cgroup", lambda: (8 * GIB, 3 * GIB))
    assert budget.device_memory("cpu") == Memory(8 * GIB, 5 * GIB)


def test_measures_this_machine():
    memory = budget.device_memory("cpu")
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 0 < budget.now_bytes("cpu") <= budget.peak_bytes("cpu") < memory.total_bytes


@pytest.mark.parametrize("device", ["tpu9", "mps", "meta", "cpu:x"])
def test_refuses_devices_of_another_kind(device):
    with pytest.raises(ConfigError, match="device: expected 'cpu', 'cuda' or 'cuda:n'"):
        budget.check_device(device)


def test_never_falls_back_to_another_device():
    absent = f"cuda:{torch.cuda.device_count() + 3}"
    with pytest.raises(ConfigError, match="is not here"):
        budget.check_device(absent)
    assert budget.check_device("cpu") == "cpu"


@pytest.fixture
def target(importable):
    return importable(Path(__file__).with_name("budget_targets.py"))


def test_an_enforced_budget_refuses_memory_and_leaves_the_process_usable(tmp_path, target):
    asked = 1200 * MIB
    outcome = run_child(f"{target}:fill", {"budget_bytes": asked}, log=tmp_path / "log")
    result = outcome.unwrap("filling")
    assert "can't allocate memory" in result["refused"]
    assert result["again"] == 16 * MIB
    assert 0.8 * asked < result["peak_bytes"] <= asked
    assert result["taken"] >= 8


def test_the_peak_can_be_reset(tmp_path, target):
    result = run_child(f"{target}:peaks", {}, log=tmp_path / "log").unwrap("peaks")
    assert min(result["high"], result["now"]) >= 256 * MIB
    assert result["low"] < result["high"] - 200 * MIB


def test_a_budget_is_resolved_in_a_child_too(tmp_path):
    outcome = run_child(
        "memfit.memory.budget:resolve_in_child", {"budget": "3GiB", "device": "cpu"}, log=tmp_path / "log"
    )
    assert outcome.unwrap("resolving") == 3 * GIB
