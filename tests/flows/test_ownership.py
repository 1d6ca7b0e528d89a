"""A flow run's device: one slot on the server and one lock on the machine; and the worker that it ends with."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import ownership
from flows.ownership import device_slot, slot_name
from flows.plan_memory import plan_config
from flows.prepare_server import install
from memfit import locks
from memfit.errors import ConfigError, RunStateError
from memfit.locks import device_locked

WORKER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""
FLOW_RUN = """
import signal, time
from flows.ownership import end_with_worker
def stop(*_):
    print("stopped", flush=True)
    raise SystemExit
signal.signal(signal.SIGTERM, stop)
end_with_worker()
print("runs", flush=True)
time.sleep(60)
"""


@pytest.fixture
def locks_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMFIT_LOCKS", str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@flow(name="hold-slot")
def hold_slot(device: str) -> float:
    started = time.monotonic()
    with device_slot(device):
        return time.monotonic() - started


def test_a_card_s_slot_is_named_by_machine_and_number(monkeypatch):
    monkeypatch.delenv("MEMFIT_MACHINE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slot_name("cuda") == slot_name("cuda:0") == "memfit-cuda-0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("MEMFIT_MACHINE", "attic")
    assert slot_name("cuda:1") == "memfit-attic-cuda-3"


def test_a_server_without_the_limit_is_told_what_installs_it(prefect_api):
    with pytest.raises(ConfigError, match=r"'memfit-cuda-7'.*python -m flows\.prepare_server --device cuda:7"):
        hold_slot("cuda:7")


def test_a_run_that_has_a_device_for_itself_waits_for_no_slot(prefect_api, monkeypatch):
    monkeypatch.setenv("MEMFIT_OWN_DEVICE", "true")
    assert hold_slot("cuda:7") < 5
    monkeypatch.setenv("MEMFIT_OWN_DEVICE", "false")
    with pytest.raises(ConfigError, match="'memfit-cuda-7'"):
        hold_slot("cuda:7")


def test_a_flow_on_a_card_takes_slot_and_lock_before_it_works(
    client, monkeypatch, root, tmp_path, locks_folder, folders
):
    install(client, ["cuda:5"], 90)
    seen = []

    def prepare(run_dir, *_where):
        seen.append(client.read_global_concurrency_limit_by_name("memfit-cuda-5").active_slots)
        named = rf"cuda:5.*in use by process {os.getpid()}"
        with pytest.raises(RunStateError, match=named), device_locked("cuda:5", tmp_path):
            pass
        raise RunStateError("enough")

    monkeypatch.setitem(plan_config.fn.__globals__, "prepare_data", prepare)
    with pytest.raises(RunStateError, match="enough"):
        plan_config(str(root / "configs/smoke.toml"), device="cuda:5", **{**folders, "runs": str(tmp_path)})
    assert seen == [1]
    assert client.read_global_concurrency_limit_by_name("memfit-cuda-5").active_slots == 0


def test_a_card_that_another_program_locked_is_refused_by_its_owner_s_name(client, root, tmp_path, locks_folder):
    install(client, ["cuda:5"], 90)
    named = rf"process {os.getpid()} .*run directory {tmp_path}/other"
    with device_locked("cuda:5", tmp_path / "other"), pytest.raises(RunStateError, match=named):
        plan_config(str(root / "configs/smoke.toml"), device="cuda:5", runs=str(tmp_path / "runs"))


def test_a_server_that_is_away_when_a_slot_is_given_back_does_not_fail_the_run(prefect_api, monkeypatch):
    @contextmanager
    def concurrency(*_names, **_settings):
        yield
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(ownership, "concurrency", concurrency)
    assert hold_slot("cuda:5") < 5


def test_the_cpu_and_a_temporary_server_have_no_slots(prefect_api, monkeypatch):
    monkeypatch.setattr(ownership, "concurrency", None)
    with device_slot("cpu"):
        pass
    with temporary_settings(restore_defaults={PREFECT_API_URL}), device_slot("cuda"):
        pass


@pytest.mark.parametrize("starter", ["worker", "person"])
def test_a_flow_run_ends_with_its_worker_and_not_with_a_person_s_shell(root, starter):
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": "x"} if starter == "worker" else dict(os.environ)
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, FLOW_RUN], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    )
    with worker:
        assert worker.stdout.readline() == "runs\n"
        flow_run = int(next_child(worker.pid))
        worker.kill()
        if starter == "worker":
            assert worker.stdout.readline() == "stopped\n"
        else:
            time.sleep(2)
            os.kill(flow_run, signal.SIGKILL)
            assert worker.stdout.readline() == ""


def next_child(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]


def test_locks_and_slots_count_devices_alike(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    monkeypatch.delenv("MEMFIT_MACHINE", raising=False)
    monkeypatch.setattr(locks, "_ASK_DRIVER", "raise SystemExit(1)")
    assert slot_name("cuda") == f"memfit-{locks.physical_device('cuda')}"
