"""`memfit devices`: the catalog, and above it what is here."""

import json
import signal
import sys

import pytest
import torch

from memfit import cli
from memfit.memory import budget, devices, host
from memfit.memory.devices import CATALOG, describe_card
from memfit.memory.host import Memory

GIB = 2**30


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Call `memfit ARGS` in this process; return its exit status, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["memfit", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_cards(monkeypatch):
    """Two T4: one shared with another process, one so full that no context fits."""

    def memory(device: str) -> Memory:
        if device == "cuda:1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Memory(14 * GIB, 9 * GIB)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(budget, "device_memory", memory)
    monkeypatch.setattr(budget, "other_processes", lambda device: [(77, 4 * GIB)] if device == "cuda:0" else [])
    monkeypatch.setattr(devices, "_real_card", lambda name: describe_card(name, "Tesla T4", 15 * GIB, (7, 5), 40))


def test_shows_a_line_for_each_card_of_the_catalog(run_cli, no_card):
    status, out, err = run_cli("devices")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("name "))
    assert lines[start].split("  ")[0] == "name"
    rows = {line.split()[0]: line for line in lines[start + 1 :] if line and not line.startswith("Contexts")}
    assert list(rows) == [card.name for card in CATALOG]
    for part in ("NVIDIA T4", "14.74 GiB", "7.5", "fp32 fp16", "efficient math", "115 MiB"):
        assert part in rows["t4"]
    assert "fp32 bf16 fp16" in rows["a100-40"]
    assert "flash efficient math" in rows["a100-40"]


def test_shows_above_it_what_is_here(run_cli, no_card, monkeypatch):
    monkeypatch.setattr(host, "machine_memory", lambda: Memory(64 * GIB, 40 * GIB))
    monkeypatch.setattr(host, "cgroup_memory", lambda: (8 * GIB, 3 * GIB))
    _, out, _ = run_cli("devices")
    here = out.split("Catalog")[0]
    assert f"{host.num_cores()} cores, RAM 64.00 GiB, 5.00 GiB free, cgroup limit 8.00 GiB" in here
    assert "none that this torch sees" in here


def test_shows_cards_that_are_here_and_who_shares_them(run_cli, two_cards):
    _, out, _ = run_cli("devices")
    here = out.split("Catalog")[0].splitlines()
    assert "cuda:0  Tesla T4, 15.00 GiB, 9.00 GiB free; process 77 holds 4.00 GiB" in here
    assert "cuda:1  Tesla T4, 15.00 GiB, unknown free" in here


def test_json_holds_every_field_of_every_device(run_cli, two_cards):
    status, out, err = run_cli("devices", "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert [card["name"] for card in document["catalog"]] == [card.name for card in CATALOG]
    assert set(devices.Device.__dataclass_fields__) == set(document["catalog"][0])
    cpu, cards = document["here"]["cpu"], document["here"]["cuda"]
    assert cpu["memory_bytes"] <= cpu["ram_bytes"]
    assert cpu["free_bytes"] > 0
    assert [card["free_bytes"] for card in cards] == [9 * GIB, None]
    assert cards[0]["others"] == [[77, 4 * GIB]]


def test_no_cgroup_limit_is_none(run_cli, no_card, monkeypatch):
    monkeypatch.setattr(host, "cgroup_memory", lambda: (host.NO_LIMIT, 0))
    assert "cgroup limit none" in run_cli("devices")[1]
    assert json.loads(run_cli("devices", "--json")[1])["here"]["cpu"]["cgroup_limit_bytes"] is None


def test_a_rocm_build_has_no_cuda_cards(run_cli, two_cards, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "none that this torch sees" in run_cli("devices")[1]


def test_explains_itself(run_cli):
    status, out, _ = run_cli("devices", "--help")
    assert status == 0
    assert "--json" in out
