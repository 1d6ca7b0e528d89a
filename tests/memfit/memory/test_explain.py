"""`memfit explain-oom`: real scripts in real children, under a budget enforced on the CPU."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memfit.errors import ConfigError
from memfit.memory.advice import advise, needs
from memfit.memory.explain import explain_script
from memfit.memory.held import requested_bytes

MIB = 2**20
NET = """
import sys
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(64, 256)
        self.blocks = nn.Sequential(*[Block() for _ in range(6)])

    def forward(self, x):
        return self.blocks(self.stem(x))

net = Net()
optimizer = torch.optim.AdamW(net.parameters())
for _ in range(2):
    loss = net(torch.randn(int(sys.argv[1]), 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("ended well", __name__, sys.argv)
"""
BIG_STATE = """
import torch
from torch import nn
net = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(8)])
optimizer = torch.optim.AdamW(net.parameters())
net(torch.randn(8, 2048)).sum().backward()
optimizer.step()
"""


@pytest.fixture
def script(tmp_path):
    def write(text: str):
        path = tmp_path / "train.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def explain(*arguments, **settings):
    command = [sys.executable, "-m", "memfit.cli", "explain-oom", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)


def test_a_batch_too_large_is_explained_by_category_and_module(script):
    path = script(NET)
    said = explain("--json", "--budget", "700MiB", path, 100_000)
    assert said.returncode == 9, said.stderr
    report = json.loads(said.stdout)
    assert (report["status"], report["phase"], report["module"]) == ("oom", "forward", "blocks.0")
    assert report["request_bytes"] == 100_000 * 512 * 4
    assert report["source"]["code"] == "return x + self.down(torch.relu(self.up(x)))"
    assert report["categories"]["parameters"] == (65 * 256 + 6 * (257 * 512 + 513 * 256)) * 4
    assert report["categories"]["activations"] == 100_000 * (256 + 512) * 4
    assert report["categories"]["batch_and_other"] == 100_000 * 64 * 4
    assert report["modules"][0]["module"] == "blocks.0.up"
    assert sum(report["categories"].values()) == report["tensor_bytes"] < report["process_bytes"] <= 700 * MIB
    advice = {each["lever"]: each for each in report["advice"]}
    assert set(advice) == {"accumulation", "checkpointing", "mixed_precision", "plan"}
    assert advice["accumulation"]["fits"]
    assert "Block" in advice["checkpointing"]["text"]
    for words in ("blocks.0.up", "asking for 195 MiB", "Gradient accumulation", "train.py:12"):
        assert words in said.stderr
    # Where blocks lie in the heap is chance, and the advice an estimate: half of it must fit whatever the chance.
    smaller = explain("--budget", "700MiB", path, advice["accumulation"]["micro_batch_size"] // 2)
    assert smaller.returncode == 0, smaller.stderr


def test_state_that_does_not_fit_is_found_in_the_first_step(script):
    report = explain_script(script(BIG_STATE), budget="700MiB")
    assert (report["status"], report["exit_status"], report["phase"]) == ("oom", 9, "optimizer")
    held = report["categories"]
    assert held["parameters"] == held["gradients"] == 128 * MIB
    assert 0 < held["optimizer_state"] < report["expected_state_bytes"] == 256 * MIB
    assert report["source"]["code"] == "optimizer.step()"
    assert (report["advice"][0]["lever"], report["advice"][0]["fits"]) == ("fixed", False)
    assert "SGD" in report["advice"][0]["text"]


def test_a_script_that_ends_well_keeps_its_arguments_and_tells_its_peak(script):
    said = explain("--budget", "2GiB", path := script(NET), 2000, "--json")
    assert said.returncode == 0
    assert said.stdout == f"ended well __main__ {[str(path), '2000', '--json']}\n"
    assert "ended without running out of memory; tensors held at most" in said.stderr
    assert "Near the peak" in said.stderr


def test_standard_input_and_the_scripts_own_folder_are_its_own(script, tmp_path):
    (tmp_path / "helper.py").write_text("double = lambda text: text * 2", encoding="utf-8")
    said = explain(script("import sys, helper\nprint(helper.double(sys.stdin.read()))\nsys.exit(3)"), input="ab")
    assert (said.returncode, said.stdout) == (3, "abab\n")


def test_another_error_is_the_scripts_own(script):
    said = explain(script("def wrong():\n    return {}['key']\nwrong()"))
    assert said.returncode == 1
    assert "out of memory" not in said.stderr
    assert said.stderr.startswith("Traceback (most recent call last):\n  File ")
    assert "explain_child" not in said.stderr
    assert said.stderr.rstrip().endswith("KeyError: 'key'")


def test_memory_that_ran_out_and_was_caught_is_only_counted(script):
    text = "import torch\ntry:\n    torch.empty(2**40)\nexcept RuntimeError:\n    print('smaller')"
    said = explain("--budget", "1GiB", script(text))
    assert (said.returncode, said.stdout) == (0, "smaller\n")
    assert "memory ran out 1 times, and the script went on" in said.stderr


def test_an_error_raised_from_one_of_memory_is_explained(script):
    text = (
        "import numpy\ntry:\n    numpy.ones(2**37)\nexcept MemoryError as error:\n    raise ValueError('x') from error"
    )
    report = explain_script(script(text), budget="1GiB")
    assert (report["status"], report["request_bytes"], report["source"]["line"]) == ("oom", 2**40, 3)


def test_an_interrupt_reaches_the_script(script):
    text = (
        "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    exit(7)"
    )
    command = [sys.executable, "-m", "memfit.cli", "explain-oom", str(script(text))]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # pytest itself may ignore it
    ) as child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 7


def test_the_script_dies_with_memfit(script):
    text = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-m", "memfit.cli", "explain-oom", str(script(text))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        pid = int(child.stdout.readline())
        child.kill()
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the script outlived memfit")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "none.py", "not there"),
        (lambda path: path, "a directory"),
        (lambda path: (path / "x.py").write_bytes(b"\x00\xff") and path / "x.py", "does not compile"),
    ],
)
def test_what_is_no_script_is_refused(tmp_path, make, words):
    with pytest.raises(ConfigError, match=words):
        explain_script(make(tmp_path))


@pytest.mark.parametrize(
    ("settings", "words"), [({"budget": "many"}, "budget: expected"), ({"device": "tpu"}, "device")]
)
def test_a_wrong_budget_or_device_is_refused(script, settings, words):
    with pytest.raises(ConfigError, match=words):
        explain_script(script("print('never run')"), **settings)


@pytest.mark.parametrize(
    ("message", "num_bytes"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12", 4096),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of", int(2.5 * 2**30)),
        ("Unable to allocate 1.00 MiB for an array with shape (131072,)", MIB),
        ("could not create a memory object", None),
    ],
)
def test_reads_the_failing_request_off_a_message(message, num_bytes):
    assert requested_bytes(message) == num_bytes


def test_activations_scale_with_the_batch_and_nothing_else_does():
    held = dict.fromkeys(("gradients", "optimizer_state", "buffers", "temporaries"), 0)
    report = {
        "device": "cuda:0", "phase": "backward", "tensor_bytes": 500, "process_bytes": 600, "capacity_bytes": 1000,
        "categories": {**held, "parameters": 100, "activations": 350, "batch_and_other": 50}, "full_forward": None,
        "forward_bytes": 700, "largest_activation_bytes": 25, "request_bytes": 50, "batch_bytes": 50, "batch_size": 8,
        "trainable_bytes": 100, "expected_state_bytes": 200, "blocks": {}, "modules": [],
    }  # fmt: skip
    need = needs(report)
    assert (need["fixed_bytes"], need["batch_bytes"], need["basis"]) == (
        100 + 100 + 100 + 200,
        50 + 700 + 50,
        "backward",
    )
    best = advise(report)[0]
    assert (best["micro_batch_size"], best["accumulation_steps"], best["predicted_bytes"]) == (4, 2, 500 + 400)
