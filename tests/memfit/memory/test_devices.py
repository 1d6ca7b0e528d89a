"""The catalog, how a device is found by what users write, and what users may say of their own cards."""

import re

import pytest
import torch

from memfit.errors import ConfigError
from memfit.memory.devices import CATALOG, Device, describe_card, find_device, is_here
from memfit.memory.host import Memory, host_memory

MIB, GIB = 2**20, 2**30
WANTED = ("t4", "p100", "v100-16", "v100-32", "rtx-3060", "rtx-3090", "rtx-4060", "rtx-4090", "l4", "a10", "a100-40",
          "a100-80", "h100", "h200")  # fmt: skip


def test_the_catalog_has_each_card_once():
    assert tuple(card.name for card in CATALOG) == WANTED
    assert len({card.title for card in CATALOG}) == len(WANTED)


@pytest.mark.parametrize("card", CATALOG, ids=lambda card: card.name)
def test_what_a_card_can_do_follows_from_its_compute_capability(card):
    modern = card.compute_capability >= (8, 0)
    assert ("bf16" in card.precisions) == ("flash" in card.attention_kernels) == modern
    assert {"fp32", "fp16"} <= set(card.precisions)
    assert card.attention_kernels[-2:] == ("efficient", "math")
    assert card.kind == "cuda"


@pytest.mark.parametrize("card", CATALOG, ids=lambda card: card.name)
def test_figures_of_a_card_are_complete_and_plausible(card):
    assert set(card.tflops) == set(card.precisions)
    assert card.tflops["fp32"] < card.tflops["fp16"] == card.tflops.get("bf16", card.tflops["fp16"])
    assert 200 <= card.bandwidth_gbs <= 5000
    assert 20 <= card.multiprocessors <= 150
    assert 64 * MIB <= card.context_bytes <= 600 * MIB
    assert 2.5 <= card.context_bytes / MIB / card.multiprocessors <= 5.5
    assert card.context_source


@pytest.mark.parametrize(
    ("name", "nominal_gb"), [("t4", 16), ("p100", 16), ("v100-32", 32), ("rtx-4060", 8), ("l4", 24), ("h200", 141)]
)
def test_memory_is_near_the_nominal_size(name, nominal_gb):
    assert 0.95 < find_device(name).memory_bytes / (nominal_gb * 10**9) < 1.08


@pytest.mark.parametrize(
    ("name", "measured"), [("rtx-3060", 12622168064), ("rtx-4060", 8318222336), ("a100-40", 42474471424)]
)
def test_memory_of_cards_that_others_measured_is_theirs(name, measured):
    assert find_device(name).memory_bytes == measured


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("t4", "t4"),
        ("T4", "t4"),
        (" Tesla T4 ", "t4"),
        ("rtx-3060", "rtx-3060"),
        ("RTX 3060", "rtx-3060"),
        ("rtx3060", "rtx-3060"),
        ("NVIDIA GeForce RTX 3060", "rtx-3060"),
        ("a100-40", "a100-40"),
        ("A100 40GB", "a100-40"),
        ("a100-80GB", "a100-80"),
        ("V100 32 GB", "v100-32"),
        ("H100", "h100"),
    ],
)
def test_a_card_is_found_however_its_name_is_written(text, name):
    assert find_device(text).name == name


@pytest.mark.parametrize(
    ("text", "near"),
    [("t5", "t4"), ("rtx 5090", "rtx-4090"), ("a100", "a100-40"), ("v100", "v100-16"), ("RTX 3060 Ti", "rtx-3060")],
)
def test_an_unknown_card_is_an_error_that_names_the_nearest_one_and_all(text, near):
    with pytest.raises(ConfigError, match=f"nearest valid one is '{near}'") as raised:
        find_device(text)
    assert f"device: {text!r} is not known" in str(raised.value)
    assert "cpu, cuda, cuda:n" in str(raised.value)
    assert all(name in str(raised.value) for name in WANTED)


@pytest.mark.parametrize("text", ["", "  ", "nvidia", "gpu", "0"])
def test_words_that_name_no_card_are_errors(text):
    with pytest.raises(ConfigError, match="is not known"):
        find_device(text)


@pytest.mark.parametrize("text", ["mps", "rocm", "hip", "xpu", "tpu", "MPS", "xpu:0", "hip:1"])
def test_other_kinds_of_device_are_refused_with_what_to_do(text):
    with pytest.raises(ConfigError, match=r"memfit plans for CUDA and CPU only\. Use cpu, cuda"):
        find_device(text)


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("cpu", True),
        ("CPU", True),
        ("cuda", True),
        ("cuda:12", True),
        ("t4", False),
        ("cuda:", False),
        ("mps", False),
        ("", False),
    ],
)
def test_tells_devices_of_this_machine_from_those_of_the_catalog(text, here):
    assert is_here(text) == here


def test_the_cpu_is_this_machines():
    cpu = find_device("cpu")
    assert (cpu.name, cpu.kind, cpu.compute_capability) == ("cpu", "cpu", None)
    assert cpu.memory_bytes == host_memory().total_bytes
    assert cpu.precisions == ("fp32", "bf16", "fp16")
    assert cpu.attention_kernels == ("flash", "math")
    assert cpu.multiprocessors >= 1
    assert dict(cpu.tflops) == {}


def test_the_cpu_has_what_its_container_allows(monkeypatch):
    monkeypatch.setattr("memfit.memory.devices.host_memory", lambda: Memory(GIB, 0))
    assert find_device("cpu").memory_bytes == GIB


def test_a_cuda_device_that_is_not_here_is_an_error():
    with pytest.raises(ConfigError, match="is not here"):
        find_device(f"cuda:{torch.cuda.device_count() + 3}")


def test_a_card_that_is_here_has_its_own_memory_and_the_catalogs_rates():
    card = describe_card("cuda:0", "Tesla T4", 15637086208, (7, 5), 40)
    assert (card.name, card.title, card.memory_bytes) == ("cuda:0", "Tesla T4", 15637086208)
    assert card.tflops == find_device("t4").tflops
    assert card.context_bytes == find_device("t4").context_bytes


@pytest.mark.parametrize(("memory_bytes", "like"), [(42 * 10**9, "a100-40"), (85 * 10**9, "a100-80")])
def test_cards_of_the_same_chip_are_told_apart_by_memory(memory_bytes, like):
    assert describe_card("cuda", "A100", memory_bytes, (8, 0), 108).bandwidth_gbs == find_device(like).bandwidth_gbs


def test_a_card_that_the_catalog_lacks_has_no_rates_and_a_guessed_context():
    card = describe_card("cuda:1", "NVIDIA RTX 6000 Ada", 50865307648, (8, 9), 142)
    assert card.precisions == ("fp32", "bf16", "fp16")
    assert (dict(card.tflops), card.bandwidth_gbs) == ({}, None)
    assert card.context_bytes > 426 * MIB, (
        "what nvidia-smi shows for this card with CUDA 13 (unsloth-zoo pull request 1053)"
    )
    assert card.context_source.startswith("guess")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_card_is_described():
    card = find_device("cuda")
    assert card.memory_bytes == torch.cuda.mem_get_info()[1]
    assert card.compute_capability == torch.cuda.get_device_capability()


OWN = {"name": "rtx-5090", "memory": "31.36GiB", "compute_capability": "12.0"}


def test_a_users_card_needs_three_figures():
    card = Device.from_mapping(OWN)
    assert (card.name, card.title, card.kind) == ("rtx-5090", "rtx-5090", "cuda")
    assert card.memory_bytes == int(31.36 * GIB)
    assert card.compute_capability == (12, 0)
    assert card.precisions == ("fp32", "bf16", "fp16")
    assert card.context_bytes == 512 * MIB
    assert card.context_source.startswith("guess")


def test_a_users_card_may_have_all_figures():
    settings = {
        **OWN,
        "memory": 33_000_000_000,
        "compute_capability": [7, 5],
        "title": "A card",
        "multiprocessors": 46,
        "context": "150MiB",
        "precisions": ["fp16"],
        "attention_kernels": ["math", "efficient"],
        "tflops": {"fp32": 10, "fp16": 80.5},
        "bandwidth_gbs": 448,
        "notes": "second slot",
    }
    card = Device.from_mapping(settings)
    assert card.memory_bytes == 33_000_000_000
    assert (card.context_bytes, card.context_source) == (150 * MIB, "the config")
    assert card.precisions == ("fp16",)
    assert card.attention_kernels == ("efficient", "math")
    assert (card.tflops, card.bandwidth_gbs) == ({"fp32": 10.0, "fp16": 80.5}, 448.0)
    assert (card.title, card.multiprocessors, card.notes) == ("A card", 46, "second slot")


def test_a_users_card_is_found_and_wins_over_the_catalogs():
    own = Device.from_mapping(OWN)
    small = Device.from_mapping({"name": "t4", "memory": "8GiB", "compute_capability": 7.5})
    assert find_device("RTX 5090", [own]) is own
    assert find_device("T4", [own, small]) is small
    assert find_device("l4", [own, small]).name == "l4"
    with pytest.raises(ConfigError, match=r"nearest valid one is 'rtx-5090'\..*one of rtx-5090, t4,"):
        find_device("rtx 5080", [own])


def test_a_users_title_does_not_hide_a_card_of_the_catalog():
    own = Device.from_mapping({**OWN, "name": "mine", "title": "NVIDIA T4"})
    assert find_device("t4", [own]).name == "t4"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memroy": 1}, "device 'rtx-5090': 'memroy' is an unknown key; the nearest valid one is 'memory'"),
        (
            {"memory": "24gb"},
            "device 'rtx-5090': memory: expected bytes as a whole number above 0, or text such as '24GiB', got '24gb'",
        ),
        ({"memory": "80%"}, "memory: expected bytes as"),
        ({"memory": 0}, "memory: expected bytes as a whole number above 0.*got 0"),
        ({"memory": -5}, "memory: expected"),
        ({"memory": 2.5e9}, "memory: expected"),
        ({"memory": True}, "memory: expected"),
        ({"memory": None}, "memory: expected"),
        ({"context": "nanGiB"}, "context: expected"),
        (
            {"compute_capability": "sm_86"},
            r"compute_capability: expected the card's compute capability.*'8\.6', got 'sm_86'",
        ),
        ({"compute_capability": 8}, "compute_capability: expected"),
        ({"compute_capability": [8]}, "compute_capability: expected"),
        ({"compute_capability": "3.5"}, "compute_capability: expected"),
        ({"compute_capability": float("nan")}, "compute_capability: expected"),
        ({"name": "cuda"}, "name: expected a name other than a kind of device, got 'cuda'"),
        ({"name": "RTX 5090"}, "name: expected lower-case letters"),
        ({"name": 5}, "name: expected lower-case letters"),
        ({"multiprocessors": 0}, "multiprocessors: expected a whole number above 0, got 0"),
        ({"precisions": "fp32"}, "precisions: expected a list of some of fp32, bf16, fp16, got 'fp32'"),
        ({"precisions": []}, "precisions: expected a list"),
        ({"precisions": ["fp8"]}, "precisions: expected a list"),
        ({"attention_kernels": ["xformers"]}, "attention_kernels: expected a list of some of flash, efficient, math"),
        ({"tflops": 5}, "tflops: expected TFLOP/s by precision"),
        ({"tflops": {"fp8": 5}}, "tflops: expected TFLOP/s by precision"),
        ({"tflops": {"fp32": float("inf")}}, r"tflops\.fp32: expected a number above 0, got inf"),
        ({"bandwidth_gbs": "fast"}, "bandwidth_gbs: expected a number above 0, got 'fast'"),
        ({"title": 3}, "title: expected text, got 3"),
    ],
)
def test_a_fault_in_a_users_card_says_what_where_and_what_instead(change, said):
    with pytest.raises(ConfigError, match=said):
        Device.from_mapping({**OWN, **change})


@pytest.mark.parametrize("missing", ["name", "memory", "compute_capability"])
def test_a_users_card_that_lacks_a_figure_is_an_error(missing):
    settings = {key: value for key, value in OWN.items() if key != missing}
    with pytest.raises(ConfigError, match=f"expected {missing}, which it lacks"):
        Device.from_mapping(settings)


def test_devices_do_not_change_and_compare_by_value():
    assert find_device("t4") == find_device("T4")
    assert len({find_device("t4"), find_device("T4"), find_device("l4")}) == 2
    with pytest.raises(AttributeError):
        find_device("t4").memory_bytes = 1  # type: ignore[misc]


def test_no_source_of_a_figure_is_left_out():
    assert all(re.search(r"guess|OOM report|bare context|otherwise empty", card.context_source) for card in CATALOG)
