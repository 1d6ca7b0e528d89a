"""Locks of run directories and devices: one owner, named in the refusal, and free once it is dead."""

import json
import os
import stat
import subprocess
import sys

import pytest

from memfit import locks
from memfit.config import load_config
from memfit.errors import RunStateError
from memfit.locks import device_locked, locked, physical_device, visible_device
from memfit.pipeline import open_run

CARD = "GPU-01020304-0506-0708-090a-0b0c0d0e0f10"
HOLD = """
import os, sys
from pathlib import Path
from memfit.locks import locked
with locked(Path(sys.argv[1]), "the card", Path(sys.argv[2]), "Wait."):
    forked = os.fork() if len(sys.argv) > 3 else 1
    if forked:
        print("locked", forked, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMFIT_LOCKS", str(tmp_path / "locks"))
    return tmp_path / "locks"


@pytest.fixture
def hold(tmp_path):
    """Hold a lock in another process, or in a fork of it too; return the process and the fork's pid."""
    started = []

    def start(path, *fork: str) -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), str(tmp_path), *fork],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        word, forked = process.stdout.readline().split()
        assert word == "locked"
        return process, int(forked)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_refusal_names_the_living_owner_and_a_dead_one_s_lock_is_free(tmp_path, hold):
    path = tmp_path / "card.lock"
    owner, _ = hold(path)
    named = rf"the card: in use by process {owner.pid} on .* \(alive\), run directory {tmp_path}, since 20.*Z\. Wait\."
    with pytest.raises(RunStateError, match=named), locked(path, "the card", tmp_path, "Wait."):
        pass
    owner.kill()
    owner.wait()
    with locked(path, "the card", tmp_path, "Wait."):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert path.read_text() == ""


def test_a_lock_that_outlives_its_owner_in_a_fork_is_said_to(tmp_path, hold):
    owner, forked = hold(tmp_path / "lock", "fork")
    owner.kill()
    owner.wait()
    named = rf"process {owner.pid} on .* \(dead, but a process that it forked is alive\)"
    with pytest.raises(RunStateError, match=named), locked(tmp_path / "lock", "it", tmp_path, "Wait."):
        pass
    os.kill(forked, 9)


def test_an_owner_elsewhere_is_said_to_be_elsewhere(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with locked(path, "it", tmp_path, "Wait."):
        monkeypatch.setattr(locks.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(RunStateError, match="of another machine"), locked(path, "it", tmp_path, "Wait."):
            pass


def test_an_owner_that_is_just_writing_its_name_is_another_process(tmp_path):
    path = tmp_path / "lock"
    with locked(path, "it", tmp_path, "Wait."):
        path.write_text('{"pid": 1')
        with pytest.raises(RunStateError, match="in use by another process"), locked(path, "it", tmp_path, "Wait."):
            pass


def test_a_lock_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunStateError, match="expected a lock file"), locked(tmp_path / "link", "it", tmp_path, "."):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunStateError, match="expected a lock file"), locked(tmp_path / "file/x", "it", tmp_path, "."):
        pass


def test_a_card_is_one_whatever_it_is_called_and_others_are_free(folder, tmp_path, monkeypatch):
    cards = {"cuda": CARD, "cuda:0": CARD, "cuda:1": "GPU-2"}
    monkeypatch.setattr(locks, "physical_device", cards.__getitem__)
    with device_locked("cuda", tmp_path):
        named = rf"cuda:0 \({CARD}\): in use by process {os.getpid()} .*--device"
        with pytest.raises(RunStateError, match=named), device_locked("cuda:0", tmp_path):
            pass
        with device_locked("cuda:1", tmp_path):
            pass
    with device_locked("cuda:0", tmp_path):
        pass


def test_locks_of_devices_are_everybody_s(folder, tmp_path):
    before = os.umask(0o077)
    try:
        with device_locked("cuda:0", tmp_path):
            pass
    finally:
        os.umask(before)
    (lock,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert stat.S_IMODE(lock.stat().st_mode) == 0o666


def test_a_folder_that_cannot_be_made_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEMFIT_LOCKS", str(tmp_path / "file" / "locks"))
    with pytest.raises(RunStateError, match="Set MEMFIT_LOCKS"), device_locked("cuda", tmp_path):
        pass


def test_the_cpu_is_shared(folder, tmp_path):
    with device_locked("cpu", tmp_path), device_locked("cpu", tmp_path):
        assert not folder.exists()


@pytest.mark.parametrize(
    ("visible", "device", "card"),
    [
        (None, "cuda", "cuda-0"),
        (None, "cuda:3", "cuda-3"),
        ("2,5", "cuda", "cuda-2"),
        ("2, 5", "cuda:1", "cuda-5"),
        ("2", "cuda:1", "cuda-1"),
        (f"{CARD},MIG-GPU-x/1/0", "cuda:0", CARD),
        (f"{CARD},MIG-GPU-x/1/0", "cuda:1", "MIG-GPU-x-1-0"),
    ],
)
def test_devices_are_counted_as_the_driver_does(monkeypatch, visible, device, card):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_device(device) == card


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index > 1 ? 101 : 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = i + 1 + device;
    return 0;
}
"""


def test_the_driver_names_the_card_and_no_driver_means_its_number(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler to make a driver with")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert physical_device("cuda") == physical_device("cuda:0") == CARD
    assert physical_device("cuda:1") == "GPU-02030405-0607-0809-0a0b-0c0d0e0f1011"
    assert physical_device("cuda:2") == "cuda-2"
    (tmp_path / "libcuda.so.1").write_text("no library")
    assert physical_device("cuda:1") == "cuda-1"


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(locks, "_ASK_DRIVER", "import time; time.sleep(60)")
    monkeypatch.setattr(locks, "DRIVER_SECONDS", 0.2)
    assert physical_device("cuda:1") == "cuda-1"


def test_a_run_on_a_card_owns_directory_and_card_and_a_prediction_owns_no_card(folder, tmp_path, tiny_config):
    def pipeline(name, *overrides):
        config = load_config(tiny_config, ["plan.device='cuda:7'", *overrides])
        return open_run(config, runs=tmp_path, store=tmp_path / "store", run_dir=tmp_path / name)

    first, second = pipeline("first"), pipeline("second")
    with first.locked():
        with pytest.raises(RunStateError, match="--run-dir"), first.locked():
            pass
        named = rf"cuda:7 .*run directory {tmp_path / 'first'}.*--device"
        with pytest.raises(RunStateError, match=named), second.locked():
            pass
        with pipeline("third", "plan.estimate_only=true").locked():
            pass
