"""What tensors without memory are told of a device: precision, attention, dropout, recurrent nets, foreach."""

from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental import _config as symbolic_config
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.memory import kernels as kernels_module
from memfit.memory.devices import find_device
from memfit.memory.kernels import Kernels, pretend
from memfit.memory.simulate import simulate
from memfit.step import TrainingProgram

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


class Operators(TorchDispatchMode):
    """Lists the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@contextmanager
def on(device):
    modes = Kernels(find_device(device), lambda tensor: tensor.device.type != "meta")
    with pretend(modes), modes:
        yield modes


def meta(*shape, dtype=SINGLE, requires_grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def saved_bytes(run):
    """Run something and sum the distinct storages that autograd keeps for the backward pass, parameters left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(storage.nbytes() for storage in kept.values()), result


# Autocast: "CUDA Ops that can autocast to float16 / float32 / to the widest input type" in the documentation of
# torch.amp; s is a single precision matrix, h one in half precision.
LOWER = {
    "matmul": lambda s, h: s @ s,
    "mm": lambda s, h: torch.mm(s, h),
    "bmm": lambda s, h: torch.bmm(s[None], s[None]),
    "addmm": lambda s, h: torch.addmm(s, s, s),
    "baddbmm": lambda s, h: torch.baddbmm(s[None], s[None], s[None]),
    "linear": lambda s, h: F.linear(s, s, s[0]),
    "conv1d": lambda s, h: F.conv1d(s[None], meta(4, 4, 1)),
    "conv2d": lambda s, h: F.conv2d(meta(1, 3, 8, 8), meta(4, 3, 3, 3)),
    "conv_transpose2d": lambda s, h: F.conv_transpose2d(meta(1, 3, 8, 8), meta(3, 4, 3, 3)),
    "einsum": lambda s, h: torch.einsum("ij,jk->ik", s, s),
    "prelu": lambda s, h: F.prelu(s, meta(1)),
    "gru_cell": lambda s, h: nn.GRUCell(4, 4, device="meta")(s),
}
SINGLES = {
    "softmax": lambda s, h: h.softmax(-1),
    "log_softmax": lambda s, h: F.log_softmax(h, -1),
    "layer_norm": lambda s, h: F.layer_norm(h, (4,)),
    "group_norm": lambda s, h: F.group_norm(h, 2),
    "cross_entropy": lambda s, h: F.cross_entropy(h, meta(4, dtype=torch.int64)),
    "mse_loss": lambda s, h: F.mse_loss(h, h),
    "binary_cross_entropy_with_logits": lambda s, h: F.binary_cross_entropy_with_logits(h, h),
    "smooth_l1_loss": lambda s, h: F.smooth_l1_loss(h, h),
    "exp": lambda s, h: h.exp(),
    "log1p": lambda s, h: torch.log1p(h),
    "pow": lambda s, h: h**2,
    "rpow": lambda s, h: 2**h,
    "rdiv": lambda s, h: 1 / h,
    "rsqrt": lambda s, h: h.rsqrt(),
    "sum": lambda s, h: h.sum(),
    "cumsum": lambda s, h: h.cumsum(0),
    "norm": lambda s, h: h.norm(),
    "normalize": lambda s, h: F.normalize(h),
    "cosine_similarity": lambda s, h: F.cosine_similarity(h, h),
    "softplus": lambda s, h: F.softplus(h),
    "upsample": lambda s, h: F.interpolate(h[None, None], scale_factor=2, mode="bilinear"),
}
WIDEST = {
    "addcmul": lambda s, h: torch.addcmul(s, h, h),
    "atan2": lambda s, h: torch.atan2(h, s),
    "tensordot": lambda s, h: torch.tensordot(h, s, 1),
    "bilinear": lambda s, h: F.bilinear(s, h, meta(2, 4, 4)),
    "grid_sample": lambda s, h: F.grid_sample(h[None, None], meta(1, 2, 2, 2), align_corners=False),
    "cat": lambda s, h: torch.cat([h, s]),
}
FOLLOWING = {
    "relu": lambda s, h: F.relu(h),
    "gelu": lambda s, h: F.gelu(h),
    "add": lambda s, h: h + h,
    "mean": lambda s, h: h.mean(),
    "batch_norm": lambda s, h: F.batch_norm(h, meta(4), meta(4), training=True),
    "max_pool": lambda s, h: F.max_pool1d(h[None], 2),
}


@pytest.mark.parametrize("lower", [HALF, BRAIN])
@pytest.mark.parametrize(
    ("operator", "wanted"),
    [
        *((run, "lower") for run in LOWER.values()),
        *((run, SINGLE) for run in SINGLES.values()),
        *((run, SINGLE) for run in WIDEST.values()),
        *((run, "lower") for run in FOLLOWING.values()),
    ],
    ids=[*LOWER, *SINGLES, *WIDEST, *FOLLOWING],
)
def test_autocast_follows_the_documented_lists_of_cuda(operator, wanted, lower):
    with on("a100-40"), torch.autocast("cuda", dtype=lower):
        assert operator(meta(4, 4), meta(4, 4, dtype=lower)).dtype == (lower if wanted == "lower" else wanted)


def test_autocast_casts_nothing_outside_of_a_region_in_one_that_is_off_or_of_another_device():
    with on("t4"):
        assert F.linear(meta(4, 4), meta(4, 4)).dtype == SINGLE
        with torch.autocast("cuda", enabled=False):
            assert F.linear(meta(4, 4), meta(4, 4)).dtype == SINGLE
        with torch.autocast("cpu", dtype=BRAIN):
            assert F.linear(meta(4, 4), meta(4, 4)).dtype == SINGLE
        with torch.autocast("cuda", dtype=HALF):
            with torch.autocast("cuda", enabled=False):
                assert F.linear(meta(4, 4), meta(4, 4)).dtype == SINGLE
            assert F.linear(meta(4, 4), meta(4, 4)).dtype == HALF
            assert F.linear(meta(4, 4, dtype=torch.float64), meta(4, 4, dtype=torch.float64)).dtype == torch.float64


def test_what_asks_for_autocast_is_told_of_the_pretended_one():
    with on("t4"):
        assert not torch.is_autocast_enabled()
        with torch.autocast("cuda"):
            assert torch.is_autocast_enabled()
            assert torch.get_autocast_dtype("cuda") == HALF


def test_recurrent_nets_take_what_autocast_made_of_their_input():
    first, net = nn.Linear(4, 6).to("meta"), nn.LSTM(6, 6).to("meta")
    with on("t4"), torch.autocast("cuda"):
        assert net(first(meta(3, 2, 4)))[0].dtype == HALF


def test_parameters_are_cast_once_in_a_region_and_anew_in_the_next():
    layer = nn.Linear(8, 8, device="meta")
    with on("t4") as modes, Operators() as operators:
        for casts in (3, 6):  # weight, bias and the first input; the second is of lower precision already
            with torch.autocast("cuda", dtype=HALF):
                layer(layer(meta(2, 8)))
                assert modes.autocast._casts
            assert not modes.autocast._casts
            assert operators.names.count("_to_copy") == casts


def test_inner_regions_keep_the_casts_of_the_outer_one():
    layer = nn.Linear(8, 8, bias=False, device="meta")
    with on("t4"), Operators() as operators, torch.autocast("cuda", dtype=HALF):
        for _ in range(3):
            with torch.autocast("cuda", dtype=HALF):
                layer(meta(2, 8, dtype=HALF))
    assert operators.names.count("_to_copy") == 1


def attend(device, dtype, *, width=64, values=None, length=16, keys=None, p=0.0, mask=None, causal=False, train=True):
    """Attend on a device; return the kernel and the bytes that are kept for the backward pass."""
    keys = keys or length
    with on(device), Operators() as operators, torch.set_grad_enabled(train):
        query = meta(2, 4, length, width, dtype=dtype, requires_grad=True)
        key = meta(2, 4, keys, width, dtype=dtype, requires_grad=True)
        value = meta(2, 4, keys, values or width, dtype=dtype, requires_grad=True)
        bytes_, _out = saved_bytes(lambda: F.scaled_dot_product_attention(query, key, value, mask, p, causal))
    for kernel in ("flash", "efficient"):
        if f"_scaled_dot_product_{kernel}_attention" in operators.names:
            return kernel, bytes_
    return "math" if "_safe_softmax" in operators.names or "softmax" in operators.names else "?", bytes_


@pytest.mark.parametrize(
    ("device", "dtype", "options", "kernel"),
    [
        ("t4", SINGLE, {}, "efficient"),
        ("t4", HALF, {}, "efficient"),
        ("t4", HALF, {"width": 12}, "math"),  # tensor cores want rows of 16 bytes
        ("t4", SINGLE, {"width": 3}, "efficient"),  # without tensor cores any width will do
        ("p100", HALF, {"width": 12}, "efficient"),
        ("a100-40", SINGLE, {"width": 3}, "math"),
        ("a100-40", SINGLE, {"width": 12}, "efficient"),
        ("a100-40", BRAIN, {}, "flash"),
        ("a100-40", BRAIN, {"p": 0.1}, "flash"),
        ("a100-40", BRAIN, {"mask": meta(16, 16, dtype=torch.bool)}, "efficient"),
        ("a100-40", BRAIN, {"mask": meta(16, 16, dtype=BRAIN), "p": 0.1}, "efficient"),
        ("a100-40", BRAIN, {"width": 256}, "flash"),
        ("a100-40", BRAIN, {"width": 257}, "math"),
        ("a100-40", BRAIN, {"width": 264}, "efficient"),
        ("a100-40", BRAIN, {"values": 32}, "efficient"),
        ("a100-40", BRAIN, {"causal": True, "keys": 32}, "efficient"),
        ("a100-40", SINGLE, {"width": 257}, "math"),
        ("rtx-3060", BRAIN, {"width": 200}, "efficient"),  # flash cannot go backward there
        ("rtx-3060", BRAIN, {"width": 200, "train": False}, "flash"),
        ("rtx-3060", BRAIN, {"width": 256}, "flash"),
        ("rtx-3060", BRAIN, {"width": 256, "p": 0.1}, "efficient"),
        ("h200", BRAIN, {"width": 200}, "flash"),
    ],
)
def test_attention_takes_the_kernel_that_the_device_would(device, dtype, options, kernel):
    assert attend(device, dtype, **options)[0] == kernel


def test_a_card_without_bf16_takes_the_plain_kernel_for_it():
    assert attend("t4", BRAIN)[0] == "math"


@pytest.mark.parametrize(("device", "dtype", "p"), [("t4", SINGLE, 0.0), ("t4", SINGLE, 0.2), ("a100-40", HALF, 0.2)])
def test_fused_attention_keeps_no_matrix_of_length_times_length(device, dtype, p):
    kernel, kept = attend(device, dtype, length=1024, p=p)
    rows = 2 * 4 * 1024
    operands = 4 * rows * 64 * dtype.itemsize  # query, key, value and output
    assert kernel in ("efficient", "flash")
    assert operands < kept < operands + rows * 4 + 4096  # and the log-sum-exp of every row, and seeds


def test_plain_attention_keeps_the_matrix():
    kernel, kept = attend("a100-40", SINGLE, width=63, length=1024)
    assert kernel == "math"
    assert kept >= 2 * 4 * 1024 * 1024 * 4


@pytest.mark.parametrize(("device", "mask_bytes"), [("t4", 1), ("cpu", 4)])
def test_dropout_keeps_a_byte_a_value_on_cuda_and_a_float_on_a_cpu(device, mask_bytes):
    with on(device):
        x = meta(32, 64, requires_grad=True)
        kept, out = saved_bytes(lambda: F.dropout(x, 0.1, True))
    assert kept == 32 * 64 * mask_bytes
    assert out.shape == x.shape


@pytest.mark.parametrize(("p", "train"), [(0.0, True), (0.1, False)])
def test_dropout_that_drops_nothing_keeps_nothing(p, train):
    with on("t4"):
        kept, _out = saved_bytes(lambda: F.dropout(meta(32, 64, requires_grad=True), p, train))
    assert kept == 0


@pytest.mark.parametrize(("kind", "values"), [(nn.LSTM, 6), (nn.GRU, 5), (nn.RNN, 2)])
def test_recurrent_nets_keep_one_reserve_on_cuda(kind, values):
    steps, batch, hidden, layers, directions = 10, 8, 16, 2, 2
    net = kind(12, hidden, layers, batch_first=True, bidirectional=True).to("meta")
    with on("t4"):
        x = meta(batch, steps, 12, requires_grad=True)
        kept, (out, state) = saved_bytes(lambda: net(x))
        assert out.shape == (batch, steps, directions * hidden)
        shape = (layers * directions, batch, hidden)
        assert (state[0] if isinstance(state, tuple) else state).shape == shape
        out.sum().backward()
    weights = sum(parameter.numel() for parameter in net.parameters())
    states = 2 if kind is nn.LSTM else 1
    wanted = x.numel() + out.numel() + states * layers * directions * batch * hidden + weights
    wanted += values * layers * directions * steps * batch * hidden
    assert kept == 4 * wanted
    assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in net.parameters())
    assert x.grad.shape == x.shape


def largest_of_the_update(device):
    program = TrainingProgram(
        variants={"only": lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))},
        make_batch=lambda n, _seq_len=None: torch.zeros(n, 64),
        loss=lambda model, batch: model(batch).mean(),
        optimizer=lambda model: torch.optim.Adam(model.parameters()),
    )
    trace = simulate(program, find_device(device), micro_batch_size=1, num_steps=1)
    begin = max(index for index, phase in trace.marks if phase == "optimizer")
    live = dict(trace.live_bytes())
    return max(live[index] for index in live if index >= begin) - live[begin - 1]


def test_foreach_optimizers_hold_temporaries_of_all_parameters_on_cuda_only():
    layer = 64 * 64 * 4
    assert largest_of_the_update("t4") >= 8 * layer
    assert largest_of_the_update("cpu") <= 3 * layer


PATCHED = [
    (torch.amp.autocast_mode.autocast, "__init__"),
    (torch.amp.autocast_mode.autocast, "__enter__"),
    (torch.amp.autocast_mode.autocast, "__exit__"),
    (torch, "is_autocast_enabled"),
    (torch._C, "_is_any_autocast_enabled"),
    (torch, "get_autocast_dtype"),
    (torch.amp, "is_autocast_available"),
    (import_module("torch.optim.optimizer"), "_get_foreach_kernels_supported_devices"),
    (torch.utils._foreach_utils, "_get_foreach_kernels_supported_devices"),
    (symbolic_config, "meta_nonzero_assume_all_nonzero"),
    *(
        (module, name)
        for module in (torch.nn.functional, torch.functional, torch._tensor, torch.autograd)
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        if hasattr(module, name)
    ),
]


def fail(device):
    with on(device):
        assert [getattr(owner, name) for owner, name in PATCHED] != BEFORE
        raise ZeroDivisionError


BEFORE = [getattr(owner, name) for owner, name in PATCHED]


@pytest.mark.parametrize("device", ["t4", "cpu"])
def test_torch_is_as_it_was_afterwards_even_after_an_error(device):
    with pytest.raises(ZeroDivisionError):
        fail(device)
    assert [getattr(owner, name) for owner, name in PATCHED] == BEFORE
    with torch.autocast("cpu", dtype=BRAIN):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == BRAIN


def test_every_attribute_that_is_patched_is_looked_at_above():
    def attributes():
        modules = {owner for owner, _ in PATCHED} | {torch.nn, torch.utils, torch.cuda, torch.optim, torch.amp}
        return {(owner, name): value for owner in modules for name, value in vars(owner).items()}

    before = attributes()
    with on("t4"):
        inside = attributes()
    changed = {key for key, value in inside.items() if key not in before or value is not before[key]}
    assert changed <= set(PATCHED)


@pytest.mark.parametrize("move", [lambda x: x.cuda(), lambda x: x.to("cuda:0"), lambda x: x.to(torch.device("cuda"))])
def test_moves_to_cuda_make_a_copy_on_the_pretended_card(move):
    with on("t4"):
        x = torch.zeros(3, 2, dtype=HALF)
        moved = move(x)
        assert (moved.device.type, moved.shape, moved.dtype) == ("meta", (3, 2), HALF)
        assert move(moved) is moved
    assert x.device.type == "cpu"


def test_tensors_can_be_made_on_cuda():
    with on("t4"):
        assert torch.zeros(2, device="cuda").device.type == "meta"
        assert torch.full((2,), 1.0, device=torch.device("cuda", 0)).device.type == "meta"


def test_a_device_with_the_plain_kernel_alone_takes_it():
    bare = replace(find_device("a100-40"), attention_kernels=("math",))
    modes = kernels_module.Kernels(bare, lambda tensor: tensor.device.type != "meta")
    with pretend(modes), modes, Operators() as operators:
        F.scaled_dot_product_attention(*(meta(1, 2, 8, 64, dtype=HALF) for _ in range(3)))
    assert "_scaled_dot_product_flash_attention" not in operators.names
