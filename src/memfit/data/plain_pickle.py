"""Read the data of a pickle without running it: dicts, lists, tuples, text, bytes, numbers and arrays of bytes.

A pickle is a program. This reader interprets the few instructions that build data and refuses all others; nothing is
imported and nothing called, so hostile bytes can do no more than be refused.
"""

import io
import pickletools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.errors import DataError

MAX_STEPS = 1 << 22
"""Most instructions of one pickle; a file of CIFAR has some 60,000."""
_GLOBALS = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}
"""Names that may stand in a pickle, and what this reader takes them for."""
_MARK = object()
_SILENT = ("PROTO", "FRAME")
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "STRING")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Name:
    """A permitted global, which is never looked up."""

    def __init__(self, role: str) -> None:
        self.role = role


class _Parts:
    """What numpy would be called with, and the state that follows."""

    def __init__(self, role: str, arguments: tuple[Any, ...]) -> None:
        self.role, self.arguments = role, arguments
        self.state: Any = None


def read_plain_pickle(raw: bytes, what: str) -> Any:
    """Return what a pickle of protocol 2 to 4 holds; text of Python 2 comes as str, one character a byte.

    Arrays must be of unsigned bytes. `what` names the file in messages. Raises DataError for anything else.
    """
    reader = _Reader()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(raw))):
            if count >= MAX_STEPS:
                raise _RefusedError(f"more than {MAX_STEPS:,} instructions")
            if opcode.name == "STOP":
                return _finished(reader.stack.pop())
            reader.step(opcode.name, argument)
    except (_RefusedError, ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        raise DataError(
            f"{what}: expected a pickle of arrays, lists and text; got {error!s:.200}. Nothing of it was run; take the "
            "original archive"
        ) from error
    raise DataError(f"{what}: expected a whole pickle, got one without an end. Fetch it again")


class _RefusedError(Exception):
    """Say which instruction is none of data."""


class _Reader:
    """A stack machine that knows the instructions of plain data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Run one instruction."""
        if name in _VALUES or name in _TEXTS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name not in _SILENT:
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise _RefusedError(f"the instruction {name}")
            method(argument)

    def _since_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise _RefusedError("a list without a beginning")

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise _RefusedError("items for what is no list")
        self.stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, pairs: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or any(type(key) not in (str, bytes, int) for key in pairs[::2]):
            raise _RefusedError("a key that is no text, or items for what is no dict")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, place: Any) -> None:
        self.memo[int(place)] = self.stack[-1]

    _long_binput = _put = _binput

    def _binget(self, place: Any) -> None:
        self.stack.append(self.memo[int(place)])

    _long_binget = _get = _binget

    def _global(self, name: Any) -> None:
        if name not in _GLOBALS:
            raise _RefusedError(f"the name {name!r}")
        self.stack.append(_Name(_GLOBALS[name]))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(f"{module} {name}")

    def _reduce(self, _: Any) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or type(arguments) is not tuple:
            raise _RefusedError("a call")
        if name.role == "encode":  # how Python 3 writes bytes for protocol 2
            text, encoding = arguments
            if type(text) is not str or encoding != "latin1":
                raise _RefusedError("an encoding other than latin1")
            self.stack.append(text.encode("latin1"))
        else:
            self.stack.append(_Parts(name.role, arguments))

    def _build(self, _: Any) -> None:
        state, parts = self.stack.pop(), self.stack[-1]
        if not isinstance(parts, _Parts):
            raise _RefusedError("a state for what is no array")
        parts.state = state


def _finished(value: Any) -> Any:
    """Turn the arrays of a document, at its top or in its dict, into numpy's. Deeper ones are refused."""
    if isinstance(value, dict):
        return {key: _array(item) if isinstance(item, _Parts) else item for key, item in value.items()}
    return _array(value) if isinstance(value, _Parts) else value


def _array(parts: _Parts) -> NDArray[np.uint8]:
    """Build an array of unsigned bytes [...] from what its pickle says."""
    if parts.role != "array" or type(parts.state) is not tuple or len(parts.state) != 5:
        raise _RefusedError("no array")
    _, shape, dtype, by_column, content = parts.state
    if not isinstance(dtype, _Parts) or dtype.role != "dtype" or dtype.arguments[0] not in ("u1", "|u1"):
        raise _RefusedError("an array of other than unsigned bytes")
    raw = content.encode("latin1") if isinstance(content, str) else content
    if by_column or type(raw) is not bytes:
        raise _RefusedError("an array by columns, or without bytes")
    return np.frombuffer(raw, np.uint8).reshape(shape)
