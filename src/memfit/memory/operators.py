"""What operators return on tensors that hold no memory: found out once for the same shapes, then made anew.

torch works much of that out in Python, and a step asks again for every layer, micro-step and update.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memfit.memory.devices import Device
from memfit.memory.roofline import Roofline, flat_tensors

_PLAIN = (Tensor, nn.Parameter)
_Again = Callable[[Any], Any]
"""args -> the operator's result for these."""


@dataclass(frozen=True)
class _Known:
    """An operator's answer for arguments of some shapes."""

    again: _Again
    seconds: float


_NEVER_SEEN = _Known(lambda _args: None, 0.0)


class _NotPlainError(Exception):
    """An argument is more than its shape and type."""


class Operators:
    """Runs operators and times them, once for the same shapes where `is_pure` or `is_in_place`."""

    def __init__(self, device: Device) -> None:
        self._roofline = Roofline(device)
        self._repeatable: dict[int, tuple[bool, Any]] = {}
        """By identity; the operator is kept, so that no other can take it over."""
        self._known: dict[Any, _Known | None] = {}
        """None: run it each time."""

    def run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        """Return what an operator returns, and how long it takes on the device."""
        if id(func) not in self._repeatable:
            self._repeatable[id(func)] = is_pure(func) or is_in_place(func), func
        if not self._repeatable[id(func)][0]:
            return self._really(func, args, kwargs)
        try:
            key = _key(func, args, kwargs)
            known = self._known.get(key, _NEVER_SEEN)
        except (_NotPlainError, TypeError):  # the latter where an argument cannot be hashed
            return self._really(func, args, kwargs)
        if known is _NEVER_SEEN:
            return self._learn(key, func, args, kwargs)
        return (known.again(args), known.seconds) if known else self._really(func, args, kwargs)

    def _really(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        result = func(*args, **kwargs)
        return result, self._roofline.seconds(func, args, kwargs, result) if self._roofline.known else 0.0

    def _learn(self, key: Any, func: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        storages = _storages((*args, *kwargs.values()))
        result, seconds = self._really(func, args, kwargs)
        again = _in_place(result, args) if is_in_place(func) else _anew(result, storages)
        same = storages == _storages((*args, *kwargs.values())) and key == _key(func, args, kwargs)
        self._known[key] = _Known(again, seconds) if again and same else None
        return result, seconds


def is_pure(func: Any) -> bool:
    """Tell whether an operator is torch's own and, by its schema, changes nothing and returns no view."""
    schema = func._schema
    aliases = any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))
    return bool(schema.name.startswith("aten::") and not aliases)


def is_in_place(func: Any) -> bool:
    """Tell whether an operator is torch's own and, by its schema, only writes into what it is given.

    Those that may give a tensor another shape or storage, or write into an `out`, are none of these.
    """
    schema = func._schema
    changed = [value for value in schema.arguments if value.alias_info is not None]
    plain = changed and all(value.alias_info.is_write and not value.kwarg_only for value in changed)
    returned = all(value.alias_info is not None for value in schema.returns[:1]) and len(schema.returns) < 2
    return bool(schema.name.startswith("aten::") and plain and returned and torch.Tag.inplace_view not in func.tags)


def _key(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    return id(func), torch.get_default_dtype(), _described(args), *map(_described, kwargs.items())


def _described(value: Any) -> Any:
    """Describe an argument: a tensor by its shape, all else by type and value, since 1 and 1.0 are equal."""
    kind = type(value)
    if kind in _PLAIN:
        if not _is_plain(value):
            raise _NotPlainError
        return value.size(), value.stride(), value.storage_offset(), value.dtype, value.requires_grad
    if kind is tuple or kind is list:
        return kind, *[_described(each) for each in value]
    if isinstance(value, Tensor):
        raise _NotPlainError
    return kind, value


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_meta and tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()


def _storages(values: Any) -> list[int]:
    return [tensor.untyped_storage()._cdata for tensor in flat_tensors(values)]


def _in_place(result: Any, args: Any) -> _Again | None:
    """Say what an operator that wrote into its arguments returns again."""
    if result is None:
        return lambda _args: None
    return (lambda args: args[0]) if result is args[0] else None


def _anew(result: Any, taken: list[int]) -> _Again | None:
    """Say how to make a result again; None where it is more than new tensors, each in a storage of its own."""
    kind = type(result)
    if kind not in (Tensor, tuple, list):
        return None
    parts: list[Any] = []
    for value in (result,) if kind is Tensor else result:
        if type(value) is Tensor and _is_plain(value):
            part, storage = (value.size(), value.stride(), value.dtype), value.untyped_storage()
            if storage._cdata in taken or storage.nbytes() != _made(part).untyped_storage().nbytes():
                return None
            taken = [*taken, storage._cdata]
            parts.append(part)
        elif value is None or type(value) is int:
            parts.append(value)
        else:
            return None
    if kind is Tensor:
        return lambda _args: _made(parts[0])
    return lambda _args: kind(map(_made, parts))


def _made(part: Any) -> Any:
    if type(part) is not tuple:
        return part
    size, stride, dtype = part
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")
