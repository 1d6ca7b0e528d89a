"""Operators that are run once for the same shapes: what they return is what torch returns, and nothing is mixed up."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.memory import operators as room
from memfit.memory.devices import find_device
from memfit.memory.forecast import Forecast
from memfit.memory.operators import Operators, is_in_place, is_pure
from memfit.memory.plan import Candidate
from memfit.memory.simulate import simulate
from memfit.step import TrainingProgram

aten = torch.ops.aten
T4 = find_device("t4")


class Seen(TorchDispatchMode):
    """Counts which operators torch itself is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def meta(*size, **how):
    return torch.empty(size, device="meta", **how)


def asked(operators, func, *args, **kwargs):
    """Run an operator; return its result and whether torch was asked for it."""
    with Seen() as seen:
        result, _ = operators.run(func, args, kwargs)
    return result, func._schema.name in seen.names


def shape(tensor):
    return tensor.size(), tensor.stride(), tensor.dtype, tensor.storage_offset(), tensor.untyped_storage().nbytes()


PURE = [
    (aten.mm.default, (meta(3, 4), meta(5, 4).t()), {}),
    (aten.relu.default, (meta(2, 3, 4).transpose(0, 2),), {}),
    (aten.add.Tensor, (meta(3, 1), meta(4)), {"alpha": 2}),
    (aten.clone.default, (meta(2, 3, 4, 5),), {"memory_format": torch.channels_last}),
    (aten._to_copy.default, (meta(6, 2),), {"dtype": torch.float16}),
    (aten.cat.default, ([meta(2, 3), meta(4, 3)],), {}),
    (aten.native_layer_norm.default, (meta(5, 8), [8], None, None, 1e-5), {}),
    (aten.convolution_backward.default,
     (meta(2, 4, 6, 6), meta(2, 3, 8, 8), meta(4, 3, 3, 3), [4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
      [False, True, True]), {}),
    (aten._foreach_sqrt.default, ([meta(3), meta(2, 2)],), {}),
]  # fmt: skip


@pytest.mark.parametrize(("func", "args", "kwargs"), PURE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_pure_operator_runs_once_and_its_result_is_made_anew(func, args, kwargs):
    operators = Operators(T4)
    first, _ = asked(operators, func, *args, **kwargs)
    again, was_asked = asked(operators, func, *args, **kwargs)
    assert not was_asked
    assert type(again) is type(first)
    firsts, agains = ([part] if isinstance(part, torch.Tensor) else list(part) for part in (first, again))
    assert len(firsts) == len(agains)
    storages = set()
    for one, other in zip(firsts, agains, strict=True):
        if one is None:
            assert other is None
            continue
        assert shape(one) == shape(other)
        assert other.is_meta
        assert not other.requires_grad
        storages |= {one.untyped_storage()._cdata, other.untyped_storage()._cdata}
    assert len(storages) == 2 * sum(part is not None for part in firsts)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, ([6],)),
        (aten.t.default, ()),
        (aten.detach.default, ()),
        (aten._unsafe_view.default, ([6],)),  # its schema does not say that it is a view
        (aten.unsafe_split.Tensor, (1,)),
        (aten.t_.default, ()),
        (aten.resize_.default, ([1, 6],)),
        (aten.squeeze_.dim, (0,)),
    ],
)
def test_what_shares_memory_or_changes_shapes_is_asked_every_time(func, args):
    operators = Operators(T4)
    for _ in range(3):
        x = meta(2, 3)
        result, was_asked = asked(operators, func, x, *args)
        assert was_asked
        parts = [result] if isinstance(result, torch.Tensor) else result
        assert {part.untyped_storage()._cdata for part in parts} == {x.untyped_storage()._cdata}


def test_an_out_is_written_every_time():
    operators = Operators(T4)
    for _ in range(2):
        out = meta(0)
        result, was_asked = asked(operators, aten.add.out, meta(3), meta(3), out=out)
        assert was_asked
        assert result is out
        assert out.shape == (3,)


def test_an_operator_in_place_returns_its_own_argument():
    operators = Operators(T4)
    for first in (True, False):
        x, many = meta(2, 3), [meta(3), meta(2)]
        result, was_asked = asked(operators, aten.add_.Tensor, x, meta(3))
        assert result is x
        assert was_asked is first
        result, was_asked = asked(operators, aten._foreach_mul_.Scalar, many, 2.0)
        assert result is None
        assert was_asked is first


def test_what_is_not_on_the_pretended_device_is_computed():
    operators = Operators(T4)
    assert operators.run(aten.add.Tensor, (torch.tensor(1.0), torch.tensor(2.0)), {})[0] == 3
    assert operators.run(aten.add.Tensor, (torch.tensor(2.0), torch.tensor(2.0)), {})[0] == 4
    assert operators.run(aten.add_.Tensor, (torch.tensor(5.0), torch.tensor(2.0)), {})[0] == 7


@pytest.mark.parametrize(("number", "dtype"), [(1, torch.int64), (1.0, torch.float32), (True, torch.int64)])
def test_equal_numbers_of_different_types_are_not_mixed_up(number, dtype):
    operators = Operators(T4)
    for other in (1, 1.0, True):
        operators.run(aten.mul.Tensor, (meta(3, dtype=torch.int64), other), {})
    result, was_asked = asked(operators, aten.mul.Tensor, meta(3, dtype=torch.int64), number)
    assert not was_asked
    assert result.dtype == dtype


def test_a_new_default_dtype_is_a_new_question():
    operators = Operators(T4)
    question = (meta(3, dtype=torch.int64), 0.5)
    assert operators.run(aten.mul.Tensor, question, {})[0].dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert operators.run(aten.mul.Tensor, question, {})[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_shape_strides_and_dtype_are_part_of_the_question():
    operators = Operators(T4)
    for x in (meta(4, 6), meta(6, 4).t(), meta(4, 6, dtype=torch.float16), meta(8, 6)[:4], meta(8, 6)[4:]):
        for _ in range(2):
            result, _ = operators.run(aten.clone.default, (x,), {})
            assert shape(result) == shape(x.clone())


def test_an_error_is_raised_every_time():
    operators = Operators(T4)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            operators.run(aten.mm.default, (meta(2, 3), meta(2, 3)), {})


def test_seconds_are_those_of_the_first_time():
    operators, big = Operators(T4), meta(512, 512)
    first, again = (operators.run(aten.mm.default, (big, big), {})[1] for _ in range(2))
    assert first == again > 0
    assert Operators(find_device("cpu")).run(aten.mm.default, (big, big), {})[1] == 0


def test_schemas_tell_what_may_repeat():
    assert is_pure(aten.mm.default)
    assert not any(map(is_pure, (aten.view.default, aten.add_.Tensor, aten.add.out)))
    assert is_in_place(aten.add_.Tensor)
    assert is_in_place(aten._foreach_add_.Scalar)
    assert not any(map(is_in_place, (aten.mm.default, aten.view.default, aten.add.out, aten.resize_.default)))
    assert not any(map(is_in_place, (aten.set_.source_Tensor, aten._native_batch_norm_legit.default)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.conv = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, x):
        hidden = self.conv(self.layers(self.embedding(x)).transpose(1, 2)).transpose(1, 2)
        return self.head(self.recurrent(hidden)[0])


PROGRAM = TrainingProgram(
    build_model=Net,
    make_batch=lambda n, _seq_len=None: torch.zeros(n, 12, dtype=torch.int64),
    loss=lambda model, batch: F.cross_entropy(model(batch).transpose(1, 2), batch),
    optimizer=lambda model: torch.optim.AdamW(model.parameters()),
)


@pytest.mark.parametrize("device", ["t4", "cpu"])
@pytest.mark.parametrize("how", [{"precision": "fp16"}, {}, {"foreach": False}, {"phase": "evaluate", "num_steps": 1}])
def test_a_trace_is_the_same_with_and_without(device, how, monkeypatch):
    if device == "cpu" and "precision" in how:
        how = {"precision": "bf16"}
    shared, device = Operators(find_device(device)), find_device(device)
    traces = [
        simulate(PROGRAM, device, micro_batch_size=3, accumulation_steps=2, clip=1.0, operators=operators, **how)
        for operators in (None, shared, shared)
    ]
    monkeypatch.setattr(room, "is_pure", lambda _func: False)
    monkeypatch.setattr(room, "is_in_place", lambda _func: False)
    traces.append(simulate(PROGRAM, device, micro_batch_size=3, accumulation_steps=2, clip=1.0, **how))
    assert traces[0] == traces[1] == traces[2] == traces[3]


def test_a_forecast_asks_less_the_second_time(monkeypatch):
    learned, real = [], Operators._learn

    def note(self, key, func, *rest):
        learned.append(func)
        return real(self, key, func, *rest)

    monkeypatch.setattr(Operators, "_learn", note)
    oracle = Forecast(PROGRAM, T4, evaluation_factor=4)
    oracle.of(Candidate(3, 2))
    count = len(learned)
    oracle.of(Candidate(4, 2))
    assert len(learned) - count < 0.8 * count
