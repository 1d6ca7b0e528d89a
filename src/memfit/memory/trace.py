"""What a step allocates and frees, in order: recorded below autograd, on tensors that hold no memory."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.memory.operators import Operators
from memfit.memory.roofline import flat_tensors

Workspaces = Callable[[str, tuple[Any, ...]], int]
"""(operator, args) -> bytes that the device's kernel may take while it runs, beyond its outputs."""

_READ_VALUES = frozenset(("aten::_local_scalar_dense", "aten::equal"))


@dataclass(slots=True)
class Storage:
    """One piece of device memory."""

    num_bytes: int
    category: str
    """parameters, buffers, gradients, optimizer_state, batch, activations, temporaries or workspaces."""
    phase: str
    """What the step was doing when it was born."""
    op: str = ""
    module: str = ""
    """Qualified name of the module that was running."""


@dataclass
class Trace:
    """Births and deaths of storages, in order."""

    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    """i: storage i is born; ~i (negative): it dies."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """(index into events, phase that begins there)."""
    notes: list[str] = field(default_factory=list)
    """What had to be assumed."""
    seconds: dict[str, float] = field(default_factory=lambda: {"micro": 0.0, "update": 0.0})
    """Predicted seconds of the last step: all its micro-steps, and its update; zero where the rates are not known."""
    possible: set[int] = field(default_factory=set)
    """Storages that a kernel may take or not; only upper bounds count them."""

    def sizes(self, *, upper: bool = False) -> list[int]:
        """List the storages' bytes; those that are only possible are 0 unless an upper bound is wanted."""
        return [
            0 if number in self.possible and not upper else storage.num_bytes
            for number, storage in enumerate(self.storages)
        ]

    def live_bytes(self) -> Iterator[tuple[int, int]]:
        """Yield (event index, bytes of all live storages after it)."""
        live, sizes = 0, self.sizes()
        for index, event in enumerate(self.events):
            live += sizes[event] if event >= 0 else -sizes[~event]
            yield index, live

    def peak(self) -> tuple[int, int]:
        """Return the index of the event with the most live bytes, and those bytes."""
        return max(self.live_bytes(), key=lambda pair: pair[1], default=(0, 0))


class Recorder(TorchDispatchMode):
    """Records every storage that operators create, until it is freed."""

    def __init__(self, workspaces: Workspaces, operators: Operators) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.module = ""
        self.in_program = True
        """Whether the program's own code runs, rather than memfit's step around it: only its answers are noted."""
        self._workspaces = workspaces
        self._operators = operators
        self._phase = "forward"
        self._known: dict[int, int] = {}
        self._keep: dict[int, weakref.ref[Any]] = {}
        self._in_backward = False
        self._never_inf: set[int] = set()
        self.host: set[int] = set()
        """Storages that stand for host memory: they and views of them are not on the device."""
        self.on_backward: Callable[[], None] = lambda: None

    @property
    def phase(self) -> str:
        """What the step is doing; the backward pass is recognized by itself."""
        return "backward" if self._in_backward else self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase = name
        if name == "begin":
            self.trace.seconds = dict.fromkeys(self.trace.seconds, 0.0)
        self.trace.marks.append((len(self.trace.events), name))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping the method below, which costs more than the method itself."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it allocated."""
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        backward = torch._C._current_graph_task_id() != -1
        if backward != self._in_backward:
            self._turn(backward)
        name = func._schema.name
        if name in _READ_VALUES and args[0].device.type == "meta":
            return self._assume(name, args[0])
        if name == "aten::_amp_foreach_non_finite_check_and_unscale_":
            self._never_inf.add(args[1].untyped_storage()._cdata)
        result, seconds = self._operators.run(func, args, kwargs)
        self.trace.seconds["update" if self.phase == "optimizer" else "micro"] += seconds
        for tensor in flat_tensors((result,)):
            if tensor.is_meta:
                self._born(tensor, "temporaries", name)
        extra = self._workspaces(name, args)
        if extra:
            self.trace.possible.add(self.lasting(extra, "workspaces", name))
            self.trace.events.append(~(len(self.trace.storages) - 1))
        return result

    def _assume(self, name: str, tensor: Tensor) -> Any:
        """Answer for a value that does not exist: all hold, none is NaN, gradients are finite, numbers are one."""
        key = tensor.untyped_storage()._cdata
        if key in self._never_inf:
            return 0.0
        if not self.in_program:
            return 1.0 if tensor.dtype.is_floating_point else 1
        note = f"{name.removeprefix('aten::')} of {tensor.dtype} in {self.module or 'the step'}: assumed true or 1"
        if note not in self.trace.notes:
            self.trace.notes.append(note)
        if name == "aten::equal" or tensor.dtype == torch.bool:
            return self.trace.storages[self._known[key]].op != "aten::any" if key in self._known else True
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _turn(self, backward: bool) -> None:
        self._in_backward = backward
        self.trace.marks.append((len(self.trace.events), "backward" if backward else self._phase))
        if backward:
            self.on_backward()

    def _born(self, tensor: Tensor, category: str, op: str = "") -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self.host:
            return False
        number = len(self.trace.storages)
        self.trace.storages.append(Storage(storage.nbytes(), category, self.phase, op, self.module))
        self.trace.events.append(number)
        self._known[key] = number
        self._keep[key] = weakref.ref(storage, partial(self._died, key))
        return True

    def _died(self, key: int, _reference: Any) -> None:
        self._keep.pop(key, None)
        number = self._known.pop(key, None)
        if number is not None:
            self.trace.events.append(~number)

    def hold(self, tensors: Iterable[Tensor], category: str, module: str | None = None) -> None:
        """Note that these tensors are on the device from now on, or what and whose they are if they were known."""
        for tensor in tensors:
            self._born(tensor, category)
            storage = self.trace.storages[self._known[tensor.untyped_storage()._cdata]]
            storage.category = category
            storage.module = storage.module if module is None else module

    def known(self, tensor: Tensor) -> bool:
        """Tell whether a tensor's storage is on the device."""
        return tensor.untyped_storage()._cdata in self._known

    def lasting(self, num_bytes: int, category: str, op: str = "") -> int:
        """Note memory that a library takes and keeps; return its number."""
        number = len(self.trace.storages)
        self.trace.storages.append(Storage(num_bytes, category, self.phase, op, self.module))
        self.trace.events.append(number)
        return number
