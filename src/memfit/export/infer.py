"""Run the model of this folder: numpy and onnxruntime are all it needs. One file, made to be copied.

In Python: `Model("path/to/this/folder").predict(name=array, ...)`. In a terminal: `python infer.py --help`.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import re
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

CPU = "CPUExecutionProvider"
BATCH_ROWS = 8  # of a self-check: attention over long windows takes memory by the row
MAX_MODEL_BYTES = 2**31 - 1
"""What one protobuf file holds."""
MAX_CARD_BYTES = 2**26
"""Largest model card."""
MAX_LINE_CHARS = 2**18
"""Longest line of a CSV file."""
HARMLESS_BYTES = 2**28
"""What the arrays of any .npz file may take; beyond it, MAX_EXPANSION times the file's size."""
MAX_EXPANSION = 200
ORT_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
ORT_TYPES = {"float32": "float", "float64": "double"}
"""What onnxruntime calls numpy's dtypes, where it differs."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UNIT_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}
UNIT_NANOSECONDS |= {"D": 24 * UNIT_NANOSECONDS["h"], "W": 7 * 24 * UNIT_NANOSECONDS["h"]}
EXIT_CODES = """exit status:
  0  done; `check` found every output within its tolerance
  1  `check` found an output beyond its tolerance
  2  a wrong argument or input
  3  the bundle is incomplete or was changed, or the provider is not there"""


class InputError(ValueError):
    """Say which input is wrong, what was expected, what was got."""

    exit_code = 2


class BundleError(RuntimeError):
    """Say which file of the bundle cannot be trusted, or which provider is missing."""

    exit_code = 3


class MismatchError(RuntimeError):
    """Say which output differs from the expected one, by how much."""

    exit_code = 1


def bind_inputs(signature: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check arrays against a signature and cast them to its dtypes.

    A named dimension ("batch") may have any size >= 1, the same wherever the name stands. Raises InputError.
    """
    names = [spec["name"] for spec in signature]
    if set(names) != set(given):
        missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
        raise InputError(f"the inputs are {names}; missing: {missing}, unknown: {unknown}")
    sizes: dict[str, tuple[int, str]] = {}
    bound = {}
    for spec in signature:
        array = np.asarray(given[spec["name"]])
        check_shape(spec, array, sizes)
        bound[spec["name"]] = cast(spec, array)
    return bound


def check_shape(spec: Mapping[str, Any], array: Any, sizes: dict[str, tuple[int, str]]) -> None:
    """Compare an array's shape with its specification; remember in `sizes` what named dimensions are."""
    name, shape = spec["name"], spec["shape"]
    wanted = "[" + ", ".join(map(str, shape)) + "]"
    complaint = f"input '{name}': expected shape {wanted}, got {list(array.shape)}"
    if array.ndim == len(shape) - 1 and shape[:1] == ["batch"]:
        raise InputError(f"{complaint}; for a single row pass {name}[None]")
    if array.ndim != len(shape):
        raise InputError(complaint)
    for want, got in zip(shape, array.shape, strict=True):
        if isinstance(want, int) and got != want:
            raise InputError(complaint)
        if got < 1:
            raise InputError(f"{complaint}; a dimension must not be empty")
        if isinstance(want, str):
            size, first = sizes.setdefault(want, (got, name))
            if got != size:
                raise InputError(f"{complaint}; '{want}' is {size} in input '{first}'")


def cast(spec: Mapping[str, Any], array: Any) -> Any:
    """Cast to the signature's dtype where no value is lost beyond rounding; refuse NaN and infinity."""
    name, dtype = spec["name"], np.dtype(spec["dtype"])
    if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InputError(f"input '{name}': expected dtype {dtype}, got {array.dtype}; convert it first")
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array.astype(dtype, copy=False))
    bad = ~np.isfinite(result) if dtype.kind == "f" else result != array
    if bad.any():
        where = [int(i) for i in np.argwhere(bad)[0]]
        raise InputError(
            f"input '{name}': {int(bad.sum())} of {result.size} values are not finite or do not fit {dtype}; "
            f"the first at {where} is {array[tuple(where)]}. Fill or drop such rows"
        )
    return result


def split_batch(
    signature: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any], rows: int
) -> Iterator[dict[str, Any]]:
    """Yield the arrays in batches of at most `rows`; one without a "batch" dimension is in every batch whole."""
    axes = {spec["name"]: spec["shape"].index("batch") for spec in signature if "batch" in spec["shape"]}
    total = max((arrays[name].shape[axis] for name, axis in axes.items()), default=1)
    for start in range(0, total, rows):
        seen = slice(start, start + rows)
        yield {
            name: array[(slice(None),) * axes[name] + (seen,)] if name in axes else array
            for name, array in arrays.items()
        }


def join_batches(signature: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put outputs that came in batches together again."""
    return {
        spec["name"]: np.concatenate([part[spec["name"]] for part in parts], axis=spec["shape"].index("batch"))
        if "batch" in spec["shape"]
        else parts[0][spec["name"]]
        for spec in signature
    }


def compare(expected: Any, got: Any, atol: float, rtol: float) -> dict[str, Any]:
    """Measure how far `got` is from `expected`; within means |difference| <= atol + rtol * |expected| everywhere.

    `tolerance_used` is the largest share of that bound (1 is the limit). NaN is never within.
    """
    if expected.shape != got.shape or expected.dtype != got.dtype:
        raise MismatchError(f"expected {expected.dtype}{expected.shape}, got {got.dtype}{got.shape}")
    wanted, found = expected.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.where(wanted == found, 0.0, np.abs(wanted - found))
        difference[np.isnan(difference)] = np.inf
        relative = np.where(difference == 0, 0.0, difference / np.abs(wanted))
        used = np.where(difference == 0, 0.0, difference / (atol + rtol * np.abs(wanted)))
    nonzero = relative[(wanted != 0) & np.isfinite(wanted)]
    largest = float(used.max(initial=0.0))
    return {
        "max_absolute": float(difference.max(initial=0.0)),
        "max_relative": float(nonzero.max(initial=0.0)),
        "tolerance_used": largest,
        "within": largest <= 1.0,
    }


def next_step(times: Any, frequency: str | None) -> int | None:
    """Return the step between rows in nanoseconds, checked against every row; None without a fixed frequency."""
    match = re.fullmatch(r"(\d*)(ns|us|ms|s|min|h|D|W)", frequency or "")
    if match is None:
        return None
    step = int(match[1] or 1) * UNIT_NANOSECONDS[match[2]]
    uneven = np.flatnonzero(np.diff(times) != step)
    if uneven.size:
        before, after = (to_iso(times[uneven[0] + i]) for i in (0, 1))
        raise InputError(f"times: expected a row every {frequency}, but {after} follows {before}; fill the gaps first")
    return step


def take_history(
    times: Any, values: Any, extras: Any, extra_columns: Sequence[str], num_rows: int
) -> tuple[Any, Any, Any]:
    """Check the history of a series and return its last `num_rows` rows: times [n], values [n], extras [n, E]."""
    stamps = to_nanoseconds(times)
    try:
        history = np.asarray(values, np.float64)
        others = np.asarray(np.empty((len(stamps), 0)) if extras is None else extras, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"history: expected numbers; {error}") from error
    if history.shape != stamps.shape or others.shape != (len(stamps), len(extra_columns)):
        raise InputError(
            f"history: expected values [{len(stamps)}] and extras [{len(stamps)}, {len(extra_columns)}] for "
            f"{len(stamps)} times, got {list(history.shape)} and {list(others.shape)}; the extra columns are "
            f"{list(extra_columns)}"
        )
    if len(stamps) < num_rows:
        raise InputError(f"history: expected at least {num_rows} rows, got {len(stamps)}; give more of the past")
    stamps, history, others = stamps[-num_rows:], history[-num_rows:], others[-num_rows:]
    if not (np.isfinite(history).all() and np.isfinite(others).all()):
        raise InputError(f"history: the last {num_rows} rows hold NaN or infinity; fill them first")
    if (np.diff(stamps) <= 0).any():
        raise InputError("times: expected strictly increasing times; sort them and drop duplicates")
    return stamps, history, others


def to_nanoseconds(times: Any) -> Any:
    """Convert int64 nanoseconds, datetime64, datetimes or ISO 8601 texts (UTC unless they say) to int64 [N]."""
    array = np.asarray(times)
    if array.ndim != 1:
        raise InputError(f"times: expected one dimension, got shape {list(array.shape)}")
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind == "M":
        return array.astype("datetime64[ns]").astype(np.int64)
    if array.dtype.kind in "UO":
        return np.array([parse_time(value) for value in array], np.int64)
    raise InputError(f"times: expected datetimes, ISO 8601 texts or int64 nanoseconds, got {array.dtype}")


def parse_time(value: Any) -> int:
    """Convert one datetime or ISO 8601 text to nanoseconds since 1970; without an offset it is UTC."""
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise InputError(f"time {value!r}: expected ISO 8601, such as 2013-01-31T05:00:00Z") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - EPOCH) // timedelta(microseconds=1) * 1000


def to_iso(nanoseconds: Any) -> str:
    """Write nanoseconds since 1970 as ISO 8601 in UTC, to the microsecond."""
    return (EPOCH + timedelta(microseconds=int(nanoseconds) // 1000)).isoformat().replace("+00:00", "Z")


def is_plain(name: Any) -> bool:
    """Say whether a name is that of a file in the folder itself, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", "..") and "\0" not in name and Path(name).name == name


def check_card(path: Path, card: Any) -> dict[str, Any]:
    """Return a card that is what this file understands. Raises BundleError."""
    if not isinstance(card, dict) or card.get("schema") != 1:
        schema = card.get("schema") if isinstance(card, dict) else type(card).__name__
        raise BundleError(f"{path}: expected schema 1, got {schema}; take the infer.py beside it")
    files, signature = card.get("files"), card.get("signature")
    if not isinstance(files, dict) or not all(is_plain(name) and is_hashed(told) for name, told in files.items()):
        raise BundleError(f"{path}: files: expected names in this folder, with sha256 and bytes; copy the bundle again")
    for kind in ("inputs", "outputs"):
        specs = signature.get(kind) if isinstance(signature, dict) else None
        if not isinstance(specs, list) or not specs or not all(map(is_spec, specs)):
            raise BundleError(f"{path}: signature.{kind}: expected names, shapes and dtypes; copy the bundle again")
    return card


def is_hashed(told: Any) -> bool:
    """Say whether a file's entry has its size and hash."""
    return isinstance(told, dict) and isinstance(told.get("sha256"), str) and isinstance(told.get("bytes"), int)


def is_spec(spec: Any) -> bool:
    """Say whether a signature's entry has a name, a shape of sizes and names, and a dtype of numpy."""
    if not isinstance(spec, dict) or not isinstance(spec.get("shape"), list):
        return False
    try:
        np.dtype(str(spec.get("dtype")))
    except TypeError:
        return False
    return isinstance(spec.get("name"), str) and all(isinstance(size, int | str) for size in spec["shape"])


def check_graph(kind: str, specs: Sequence[Mapping[str, Any]], nodes: Sequence[Any]) -> None:
    """Compare the graph's inputs or outputs with the card's: names, dtypes, ranks and fixed sizes."""
    found = {node.name: node for node in nodes}
    if set(found) != {spec["name"] for spec in specs}:
        raise BundleError(f"model.onnx: {kind}: the card says {[s['name'] for s in specs]}, the graph {list(found)}")
    for spec in specs:
        node, shape = found[spec["name"]], spec["shape"]
        dtype = f"tensor({ORT_TYPES.get(spec['dtype'], spec['dtype'])})"
        sizes = [size if isinstance(size, int) else None for size in node.shape]
        if node.type != dtype or sizes != [size if isinstance(size, int) else None for size in shape]:
            raise BundleError(
                f"model.onnx: {kind}: expected '{spec['name']}' as {dtype} {shape}, as the card says; "
                f"got {node.type} {node.shape}"
            )


class Model:
    """The exported model: `predict` takes arrays in the units of the card's signature.

    folder: where model.onnx and model_card.json are; the folder of this file when None.
    providers: as onnxruntime takes them, in order of preference; the CPU when None. The first one must really run:
    BundleError otherwise, where a file is missing or was changed, or where the graph is not what the card says.
    The hashes show damage, not who made the bundle: `predict_series` runs its features.py as code.
    """

    def __init__(self, folder: str | Path | None = None, providers: Sequence[Any] | None = None) -> None:
        self.folder = Path(__file__).resolve().parent if folder is None else Path(folder)
        self.card = self._read_card()
        self.inputs: list[dict[str, Any]] = self.card["signature"]["inputs"]
        self.outputs: list[dict[str, Any]] = self.card["signature"]["outputs"]
        self.session = self._open_session(list(providers or [CPU]))
        self._features: ModuleType | None = None

    def predict(self, **inputs: Any) -> dict[str, Any]:
        """Return one array per output name. Raises InputError where an input does not match the signature."""
        feeds = bind_inputs(self.inputs, inputs)
        names = [spec["name"] for spec in self.outputs]
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def check(self) -> dict[str, Any]:
        """Verify every file's sha256, run sample_inputs.npz and compare with expected_outputs.npz.

        Returns the figures per output; raises MismatchError where one is beyond the card's tolerance.
        """
        for name in self.card["files"]:
            self._verified_path(name)
        expected = load_arrays(self.folder / "expected_outputs.npz")
        samples = split_batch(self.inputs, load_arrays(self.folder / "sample_inputs.npz"), BATCH_ROWS)
        got = join_batches(self.outputs, [self.predict(**rows) for rows in samples])
        if set(expected) != set(got):
            raise BundleError(f"expected_outputs.npz holds {sorted(expected)}, the model gives {sorted(got)}")
        figures = {
            name: self.card["tolerances"][name] | compare(expected[name], got[name], **self.card["tolerances"][name])
            for name in got
        }
        beyond = [name for name, figure in figures.items() if not figure["within"]]
        if beyond:
            raise MismatchError(f"beyond tolerance: {beyond}; {json.dumps(figures)}")
        return figures

    def predict_series(self, times: Any, values: Any, extras: Any = None) -> dict[str, Any]:
        """Predict the row that follows the last of a series' history.

        times [N] (see to_nanoseconds), values [N], extras [N, E] in the card's order of `extra_columns`; all in the
        user's units, oldest first. Only the last `rows_needed` rows matter. Returns the outputs for that one row
        without their batch dimension, `after` (the last time given) and `time` (the predicted row's; None where the
        series has no fixed frequency).
        """
        series = self.series
        stamps, history, others = take_history(times, values, extras, series["extra_columns"], self.rows_needed)
        step = next_step(stamps, series.get("frequency"))
        feeds = {"history": history[None, len(history) - int(series["context"]) :]}
        if any(spec["name"] == "features" for spec in self.inputs):
            try:
                threshold, spec = series["threshold"], series["feature_spec"]
                feeds["features"] = self.features.compute_features(stamps, history, others, threshold, spec)[-1:]
            except ValueError as error:
                raise InputError(f"features.py: {error}") from error
        row = {name: array[0] for name, array in self.predict(**feeds).items()}
        after = to_iso(stamps[-1])
        return row | {"after": after, "time": None if step is None else to_iso(stamps[-1] + step)}

    @property
    def rows_needed(self) -> int:
        """How many rows of history a prediction reads."""
        return max(int(self.series["context"]), int(self.series["lookback"]), 1)

    @property
    def features(self) -> ModuleType:
        """The bundle's features.py, verified, then imported from this folder and no other."""
        if self._features is None:
            path = self._verified_path("features.py")
            name = f"bundle_features_{self.card['files']['features.py']['sha256'][:16]}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # dataclasses look their module up there
            before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the bundle stays as it was written
            try:
                spec.loader.exec_module(module)
            finally:
                sys.dont_write_bytecode = before
            self._features = module
        return self._features

    @property
    def series(self) -> dict[str, Any]:
        """The card's section on the series that was learnt. Raises InputError where the model is of another kind."""
        section = self.card.get("series")
        if not isinstance(section, dict):
            raise InputError("this model does not predict a series; call predict with the inputs of its signature")
        return section

    def _read_card(self) -> dict[str, Any]:
        path = self.folder / "model_card.json"
        if not path.is_file():
            raise BundleError(f"{path} is not there; give the folder that holds the exported model")
        if path.stat().st_size > MAX_CARD_BYTES:
            raise BundleError(f"{path}: expected at most {MAX_CARD_BYTES} bytes, got {path.stat().st_size}")
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not JSON: {error}; copy the bundle again") from error
        return check_card(path, card)

    def _verified_path(self, name: str) -> Path:
        path, known = self.folder / name, self.card["files"].get(name)
        if known is None or not path.is_file():
            raise BundleError(f"{path} is not there, or the card does not list it; copy the whole bundle")
        if path.stat().st_size != known["bytes"]:  # before it is read: it may be huge
            told = f"sha256 {known['sha256']} and {known['bytes']} bytes"
            raise BundleError(f"{path}: expected {told}, got {path.stat().st_size} bytes; copy the bundle again")
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != known["sha256"]:
            raise BundleError(f"{path}: expected sha256 {known['sha256']}, got {digest}; copy the bundle again")
        return path

    def _open_session(self, providers: list[Any]) -> Any:
        wanted = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        present = onnxruntime.get_available_providers()
        absent = [name for name in wanted if name not in present]
        if absent:
            raise BundleError(f"provider {absent} is not in this onnxruntime, which has {present}")
        if self.card["files"].get("model.onnx", {}).get("bytes", 0) > MAX_MODEL_BYTES:
            raise BundleError(f"model.onnx: expected at most {MAX_MODEL_BYTES} bytes; see the card")
        try:
            session = onnxruntime.InferenceSession(self._verified_path("model.onnx"), providers=providers)
        except ORT_ERRORS as error:  # among them operators that are unknown, and weights outside the folder
            raise BundleError(f"model.onnx: onnxruntime does not load it: {error}") from error
        check_graph("inputs", self.inputs, session.get_inputs())
        check_graph("outputs", self.outputs, session.get_outputs())
        # onnxruntime goes on with the CPU, silently, where a provider does not start.
        if session.get_providers()[0] != wanted[0]:
            raise BundleError(f"provider: expected {wanted[0]} to run, got {session.get_providers()}")
        return session


def load_arrays(path: Path) -> dict[str, Any]:
    """Read all arrays of an .npz file; pickled objects are refused."""
    if not path.is_file():
        raise InputError(f"{path} is not there; expected an .npz file with one array per input")
    try:
        if zipfile.is_zipfile(path):
            check_expansion(path)
        with path.open("rb") as file:
            opened = np.load(file, allow_pickle=False)
            arrays = None if isinstance(opened, np.ndarray) else {name: opened[name] for name in opened.files}
    except (ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: expected an .npz file of plain arrays; {error}") from error
    if arrays is None:
        raise InputError(f"{path}: expected an .npz file with one array per input, got a single .npy array")
    return arrays


def check_expansion(path: Path) -> None:
    """Refuse a zip file that says it expands further than arrays do; what is more than it says is never read."""
    with zipfile.ZipFile(path) as opened:
        num_bytes = sum(member.file_size for member in opened.infolist())
    if num_bytes > max(HARMLESS_BYTES, MAX_EXPANSION * path.stat().st_size):
        raise InputError(f"{path}: expected to expand to {MAX_EXPANSION} times its size at most, got {num_bytes} bytes")


def short_lines(path: Path, opened: TextIO) -> Iterator[str]:
    """Yield the lines of a text file. Raises InputError for one that is too long, without reading all of it."""
    while line := opened.readline(MAX_LINE_CHARS + 1):
        if len(line) > MAX_LINE_CHARS:
            raise InputError(f"{path}: a line is longer than {MAX_LINE_CHARS} characters; expected a CSV file")
        yield line


def read_csv(path: Path, series: Mapping[str, Any], num_rows: int) -> tuple[list[int], Any, Any]:
    """Read the last rows of a CSV's time, value and extra columns, holding no more than those rows."""
    columns = [series["time_column"], series["value_column"], *series["extra_columns"]]
    if not path.is_file():
        raise InputError(f"{path} is not there; expected a CSV file with columns {columns}")
    with path.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(short_lines(path, opened))
        absent = [name for name in columns if name not in (reader.fieldnames or [])]
        if absent:
            raise InputError(f"{path}: column {absent} is not there; it has {reader.fieldnames}")
        try:
            last = deque(((reader.line_num, [row[name] for name in columns]) for row in reader), maxlen=num_rows)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: {error}") from error
    times, numbers = [], np.empty((len(last), len(columns) - 1))
    for i, (line, cells) in enumerate(last):
        try:
            times.append(parse_time(cells[0]))
            numbers[i] = [float(cell or "nan") for cell in cells[1:]]
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
    return times, numbers[:, 0], numbers[:, 1:]


def describe(card: Mapping[str, Any]) -> str:
    """Write the card's main facts as text."""
    lines = [f"{card['name']}, created {card['created']}, opset {card['opset']}"]
    for kind in ("inputs", "outputs"):
        for spec in card["signature"][kind]:
            shape = ", ".join(map(str, spec["shape"]))
            unit = f" in {spec['unit']}" if spec["unit"] else ""
            lines.append(f"{kind[:-1]:>6} {spec['name']}: {spec['dtype']} [{shape}]{unit}  {spec['description']}")
    lines += [f"metric {name}: {value}" for name, value in card.get("metrics", {}).items()]
    if "series" in card:
        series = card["series"]
        columns = [series["time_column"], series["value_column"], *series["extra_columns"]]
        lines.append(f"predict --csv reads the columns {columns}")
    return "\n".join(lines)


def run_predict(model: Model, args: argparse.Namespace) -> Any:
    """Predict from a CSV or an .npz file; return what is to be printed."""
    if args.csv is not None:
        times, values, extras = read_csv(args.csv, model.series, model.rows_needed)
        outputs = model.predict_series(times, values, extras)
    else:
        outputs = model.predict(**load_arrays(args.inputs))
    if args.out is not None:
        with args.out.open("wb") as opened:  # given a path, numpy would change its name
            np.savez(opened, **{name: array for name, array in outputs.items() if array is not None})
        return {"written": str(args.out)}
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in outputs.items()}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Use the ONNX model in this folder.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, help="the exported bundle (default: the folder of this file)")
    parser.add_argument("--provider", default=CPU, help="onnxruntime provider (default: %(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("check", help="verify the files and compare the outputs with the expected ones")
    verbs.add_parser("info", help="show inputs, outputs and metrics").add_argument(
        "--json", action="store_true", help="print the whole model card"
    )
    predict = verbs.add_parser("predict", help="print the outputs as JSON")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--csv", type=Path, help="history of a series, oldest row first: predicts the row after the last"
    )
    source.add_argument("--inputs", type=Path, help=".npz with one array per input, such as sample_inputs.npz")
    predict.add_argument("--out", type=Path, help="write the outputs to this .npz instead of printing them")
    return parser


def run(args: argparse.Namespace) -> str:
    """Do what the command line asks and return the text to print."""
    model = Model(args.folder, [args.provider])
    if args.verb == "info":
        return json.dumps(model.card, indent=2) if args.json else describe(model.card)
    document = {"within_tolerance": model.check()} if args.verb == "check" else run_predict(model, args)
    return json.dumps(document, indent=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        sys.stdout.write(run(args) + "\n")
    except (InputError, BundleError, MismatchError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except (OSError, UnicodeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return InputError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
