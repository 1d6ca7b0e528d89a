"""What a running script's tensors hold, by category and module: followed below autograd, on real tensors."""

import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.memory.owners import expected_state, find_owners, instances, qualified_names, repeated_blocks
from memfit.memory.roofline import flat_tensors
from memfit.memory.simulate import build_on_meta
from memfit.process import is_out_of_memory
from memfit.step import map_tensors, tensors_of

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer_state",
    "buffers",
    "activations",
    "temporaries",
    "batch_and_other",
)
_GROWTH = 1.05
_LEAST_PEAK = 16 * 2**20
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

Snapshot = dict[str, Any]


@dataclass(slots=True)
class _Held:
    reference: weakref.ref[Any]
    num_bytes: int
    device: str
    category: str
    """What it is unless a module or an optimizer owns it."""
    owner: int
    """id() of the module that it was made in, or 0."""


@dataclass
class Call:
    """The last call of an outermost module."""

    module: Callable[[], nn.Module | None]
    args: Any
    """Tensors without values."""
    kwargs: Any
    batch_size: int | None
    batch_bytes: int
    autocast: bool
    training: bool
    state_before: int
    """Bytes of activations that were alive before."""


class Tracker(TorchDispatchMode):
    """Follows every storage from the operator that made it until it is freed, while it is entered.

    `on_peak` gets a snapshot whenever a device holds 5 % more than at the last one; `around` adds to each what it says
    of the device. `meta`: follow tensors without memory instead of real ones.
    """

    def __init__(
        self,
        on_peak: Callable[[Snapshot], None] = lambda _snapshot: None,
        around: Callable[[str], dict[str, Any]] = lambda _device: {},
        *,
        meta: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}
        self.ran_out: tuple[str, Snapshot] | None = None
        """Message of the last error that meant that memory ran out, and what was held then. The error itself would
        keep alive what a script frees that goes on."""
        self.times_out = 0
        self.call: Call | None = None
        self.forward_bytes: dict[str, int] = {}
        """By device: activations alive when the last backward pass began."""
        self.largest_activation = 0
        self._on_peak = on_peak
        self._around, self._meta = around, meta
        self._held: dict[int, _Held] = {}
        self._activations: dict[str, int] = {}
        self._shown: dict[str, int] = {}
        self._running: list[nn.Module] = []
        self._roots: dict[int, weakref.ref[nn.Module]] = {}
        self._optimizers: dict[int, weakref.ref[Optimizer]] = {}
        self._in_optimizer = self._in_backward = False
        self._hooks = ExitStack()

    def __enter__(self) -> "Tracker":
        for handle in (
            module_hooks.register_module_forward_pre_hook(self._enter_module),
            module_hooks.register_module_forward_hook(self._leave_module, always_call=True),
            optimizer_hooks.register_optimizer_step_pre_hook(self._enter_optimizer),
            optimizer_hooks.register_optimizer_step_post_hook(self._leave_optimizer),
        ):
            self._hooks.callback(handle.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if not self._running and torch._C._current_graph_task_id() == -1:
            self._in_optimizer = False  # a step that raised never said that it ended
            self._roots[id(module)] = weakref.ref(module)
            if any(True for _ in module.parameters()):
                self._note_call(module, args, sys._getframe(1).f_locals.get("kwargs") or {})
        self._running.append(module)

    def _leave_module(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if module in self._running:
            while self._running.pop() is not module:
                pass

    def _enter_optimizer(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._optimizers[id(optimizer)] = weakref.ref(optimizer)
        self._in_optimizer = True

    def _leave_optimizer(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._in_optimizer = False

    def _note_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = (list(args), dict(kwargs))
        tensors = tensors_of(given)
        device = tensors[0].device.type if tensors else "cpu"
        with torch.utils._python_dispatch._disable_current_modes():
            args, kwargs = map_tensors(_emptied, given)
        self.call = Call(
            module=weakref.ref(module),
            args=args,
            kwargs=kwargs,
            batch_size=tensors[0].shape[0] if tensors and tensors[0].dim() else None,
            batch_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            autocast=device != "meta" and torch.is_autocast_enabled(device),
            training=module.training and torch.is_grad_enabled(),
            state_before=sum(self._activations.values()),
        )

    @property
    def phase(self) -> str:
        """What the script is doing: setup, evaluation, forward, backward, optimizer, or between steps."""
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        if self._in_optimizer:
            return "optimizer"
        if self._running:
            return "forward" if torch.is_grad_enabled() else "evaluation"
        return "between steps" if self._roots else "setup"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it made, or that there was no memory for it."""
        backward = torch._C._current_graph_task_id() != -1
        if backward and not self._in_backward:
            self.forward_bytes = dict(self._activations)
        self._in_backward = backward
        operands = flat_tensors(args)
        for tensor in operands:
            self._born(tensor, "batch_and_other", 0)
        try:
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            if is_out_of_memory(error):
                self._note_out(func, operands, error)
            raise
        category: str | None = None
        owner = 0
        for tensor in flat_tensors((result,)):
            if category is None:
                category, owner = self._kind(operands)
            self._born(tensor, category, owner)
        return result

    def _kind(self, operands: list[Tensor]) -> tuple[str, int]:
        """Tell what an operator makes now, and for which module: outside of modules, by what it is made of."""
        phase = self.phase
        if self._running:
            return ("activations" if torch.is_grad_enabled() else "temporaries"), id(self._running[-1])
        known = [held for tensor in operands if (held := self._find(tensor)) is not None]
        derived = next((held for held in reversed(known) if held.category in ("activations", "temporaries")), None)
        if phase in ("backward", "optimizer"):
            return "temporaries", 0 if derived is None else derived.owner
        if derived is not None and derived.category == "activations" and torch.is_grad_enabled():
            return "activations", 0
        return "batch_and_other", 0

    def _find(self, tensor: Tensor) -> _Held | None:
        try:
            return self._held.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return None

    def _born(self, tensor: Tensor, category: str, owner: int) -> None:
        try:
            storage = tensor.untyped_storage()
            key = storage._cdata
        except (NotImplementedError, RuntimeError):  # no storage: sparse, or a subclass's own
            return
        if key in self._held or (storage.device.type == "meta") != self._meta:
            return
        device, size = str(storage.device), storage.nbytes()
        self._held[key] = _Held(weakref.ref(storage, partial(self._died, key)), size, device, category, owner)
        live = self.live_bytes[device] = self.live_bytes.get(device, 0) + size
        if category == "activations":
            self._activations[device] = self._activations.get(device, 0) + size
            self.largest_activation = max(self.largest_activation, size)
        if live > self.peak_bytes.get(device, 0):
            self.peak_bytes[device] = live
            if live > max(_LEAST_PEAK, self._shown.get(device, 0) * _GROWTH):
                self._shown[device] = live
                self._on_peak(self.snapshot(device))

    def _died(self, key: int, _reference: Any) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self.live_bytes[held.device] -= held.num_bytes
            if held.category == "activations":
                self._activations[held.device] -= held.num_bytes

    def _note_out(self, func: Any, operands: list[Tensor], error: BaseException) -> None:
        with lifted_limit():
            self.times_out += 1
            snapshot = self.snapshot(failed_device(error), thorough=True)
            snapshot["op"] = func._schema.name.removeprefix("aten::")
            if snapshot["phase"] == "between steps" and self._kind(operands)[0] == "activations":
                snapshot["phase"] = "forward"  # the loss, outside of any module
            self.ran_out = str(error), snapshot

    def snapshot(self, device: str, *, thorough: bool = False) -> Snapshot:
        """Count what a device holds now, in bytes; `thorough` also looks for models and optimizers that never ran."""
        modules, optimizers = self._modules(thorough), self._known_optimizers(thorough)
        names, owners = qualified_names(modules), find_owners(modules, optimizers)
        categories = dict.fromkeys(CATEGORIES, 0)
        by_module: dict[str, dict[str, int]] = {}
        for key, held in list(self._held.items()):
            if held.device != device:
                continue
            category, owner = owners.storages.get(key, (held.category, held.owner))
            categories[category] += held.num_bytes
            row = by_module.setdefault(names.get(owner, "(outside of modules)"), {})
            row[category] = row.get(category, 0) + held.num_bytes
        rows = [{"module": name, "bytes": sum(row.values()), "categories": row} for name, row in by_module.items()]
        trainable = sum(size for where, size in owners.trainable.values() if where == device)
        return {
            "device": device,
            "phase": self.phase,
            "module": names.get(id(self._running[-1])) if self._running else None,
            "tensor_bytes": sum(categories.values()),
            "categories": categories,
            "modules": sorted(rows, key=lambda row: -row["bytes"]),
            "blocks": repeated_blocks(modules, names),
            "trainable_bytes": trainable,
            "expected_state_bytes": max(categories["optimizer_state"], expected_state(optimizers, trainable)),
            "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
            "forward_bytes": self.forward_bytes.get(device),
            "largest_activation_bytes": self.largest_activation,
            **self._around(device),
        }

    def _modules(self, thorough: bool) -> list[nn.Module]:
        found = [root for reference in self._roots.values() if (root := reference()) is not None]
        if thorough:
            found += instances(nn.Module)
        return list({id(each): each for root in found for each in root.modules()}.values())

    def _known_optimizers(self, thorough: bool) -> list[Optimizer]:
        found = [optimizer for reference in self._optimizers.values() if (optimizer := reference()) is not None]
        return list({id(each): each for each in (*found, *(instances(Optimizer) if thorough else []))}.values())


def _emptied(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


def failed_device(error: BaseException) -> str:
    """Tell which device ran out of memory."""
    if type(error).__name__ != "OutOfMemoryError" and "CUDA" not in str(error) and "CUBLAS" not in str(error):
        return "cpu"
    said = re.search(r"GPU (\d+)", str(error))
    return f"cuda:{said[1] if said else torch.cuda.current_device()}"


def requested_bytes(message: str) -> int | None:
    """Read the size of the failing request off an error message of torch or numpy; None where it does not say."""
    said = re.search(r"(?:ried to|nable to) allocate ([0-9.]+) (bytes|[KMGT]iB)", message)
    return None if said is None else int(float(said[1]) * _UNITS[said[2]])


def full_forward(call: Call | None) -> Snapshot | None:
    """Repeat the last call of the model on tensors without memory; None where that does not work.

    Returns: a snapshot of all that a whole forward pass keeps for the backward pass.
    """
    model = None if call is None else call.module()
    if call is None or model is None or call.autocast or not call.training:
        return None
    with suppress(Exception), torch.random.fork_rng(devices=[]), torch.enable_grad():
        copy = build_on_meta(lambda: model)
        with Tracker(meta=True) as tracker:
            output = copy(*call.args, **call.kwargs)
            snapshot = tracker.snapshot("meta")
        del output
        return {**snapshot, "largest_activation_bytes": tracker.largest_activation}
    return None


@contextmanager
def lifted_limit() -> Iterator[None]:
    """Take an enforced limit of this process's memory off for a while, so that what is held can be counted."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    lift_limit()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def lift_limit() -> None:
    """Take an enforced limit of this process's memory off."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
