"""From a source to the prepared directory: arrays, splits, normalization and a manifest."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.arrays import ArrayWriter, Moments, write_array
from memfit.data.features import compute_features, feature_names
from memfit.data.gaps import ClosedSeries, close_gaps
from memfit.data.source import SourceFile, check_files, find_files, hash_files, iso, read_series
from memfit.data.spec import SeriesSpec
from memfit.data.splits import (
    MIN_TARGETS,
    SPLITS,
    Targets,
    choose_targets,
    class_edges,
    classify,
    exceeds,
    required_rows,
)
from memfit.data.store import built, write_manifest
from memfit.files import fingerprint

SCHEMA = 1
ROWS_PER_PIECE = 1 << 14
"""How many feature rows are in memory at once."""

Progress = Callable[[str, float], None]


def prepared_fingerprint(spec: SeriesSpec, code_version: str) -> str:
    """Return the name of the prepared directory, from the spec, the source's bytes and the code version.

    Where the files lie does not matter, only their names and bytes. Raises DataError for missing files.
    """
    return _fingerprint(spec, _hashed(spec), code_version)


def _hashed(spec: SeriesSpec) -> list[SourceFile]:
    paths = find_files(spec.source)
    check_files(spec, paths)
    return hash_files(paths)


def _fingerprint(spec: SeriesSpec, files: Sequence[SourceFile], code_version: str) -> str:
    document = spec.to_dict()
    document["source"].pop("paths", None)
    sources = sorted([file.name, file.sha256] for file in files)
    return fingerprint({"schema": SCHEMA, "series": document, "sources": sources, "code_version": code_version})


def prepare_series(
    spec: SeriesSpec,
    store: Path,
    *,
    code_version: str,
    fresh: bool = False,
    on_progress: Callable[[str, float], None] | None = None,
) -> Path:
    """Write `store/<fingerprint>/` and return it; one that is there and whole is used again.

    A directory that differs from its manifest is built anew, and so is every one with `fresh`. `on_progress`
    is told the phase ("hash", "read", "features", "done") and the share of the work that is done. Raises
    DataError where the source or the series will not do.
    """
    report = on_progress or (lambda _phase, _share: None)
    report("hash", 0.0)
    files = _hashed(spec)
    name = _fingerprint(spec, files, code_version)
    about = {"schema": SCHEMA, "code_version": code_version}
    directory = built(store, name, lambda empty: {**about, **_build(spec, files, empty, report)}, fresh=fresh)
    report("done", 1.0)
    return directory


def _build(spec: SeriesSpec, files: Sequence[SourceFile], directory: Path, report: Progress) -> dict[str, Any]:
    report("read", 0.05)
    names = [spec.value_column, *spec.extra_columns]
    series = close_gaps(read_series(spec, files), names, spec.frequency, spec.gaps)
    return _write(spec, files, series, directory, report)


def outline_series(spec: SeriesSpec, directory: Path, min_targets: int = MIN_TARGETS) -> None:
    """Write the shortest series with so many targets a split and made-up values: its shapes, before data is read."""
    rows = required_rows(spec, min_targets)
    series = ClosedSeries(
        times=np.arange(rows, dtype=np.int64) * 3_600_000_000_000,
        values=np.linspace(-1.0, 1.0, rows) + spec.threshold,
        extras=np.zeros((rows, len(spec.extra_columns))),
        filled=np.zeros(rows, np.bool_),
        eligible=np.ones(rows, np.bool_),
        frequency="1h",
    )
    directory.mkdir(parents=True)
    manifest = _write(spec, [], series, directory, lambda _phase, _share: None)
    write_manifest(directory, {"schema": SCHEMA, "fingerprint": "outline", "code_version": "", **manifest})


def _write(
    spec: SeriesSpec, files: Sequence[SourceFile], series: ClosedSeries, directory: Path, report: Progress
) -> dict[str, Any]:
    targets = choose_targets(spec, series.eligible)
    values = series.values.astype(np.float32)
    edges = class_edges(spec, values[targets.of("train")])
    write_array(directory / "times.npy", series.times)
    write_array(directory / "values.npy", values)
    write_array(directory / "targets.npy", targets.rows)
    moments = _write_features(spec, series, targets.train_end, directory, report)
    return {
        **_describe_series(spec, files, series),
        **_describe_targets(spec, series.times, targets, values, edges),
        **_describe_inputs(spec, series, targets.train_end, moments),
    }


def _write_features(
    spec: SeriesSpec, series: ClosedSeries, train_end: int, directory: Path, report: Progress
) -> Moments:
    """Write the features piece by piece; return the moments of those that train targets read."""
    document, back = spec.features.to_dict(), spec.features.lookback - 1
    num_rows, num_features = len(series.values), len(feature_names(document, spec.extra_columns))
    moments = Moments(num_features)
    with ArrayWriter(directory / "features.npy", np.float32, (num_rows, num_features)) as writer:
        for start in range(0, num_rows, ROWS_PER_PIECE):
            stop = min(start + ROWS_PER_PIECE, num_rows)
            seen = slice(max(0, start - back), stop)
            features = compute_features(
                series.times[seen], series.values[seen], series.extras[seen], spec.threshold, document
            )[start - seen.start :]
            writer.write(features)
            # The last train target's own feature row is left out: no train target reads it, and an extra
            # column's gap that begins there may be filled from beyond the border.
            moments.add(features[max(0, back - start) : max(0, train_end - 1 - start)])
            report("features", 0.1 + 0.85 * stop / num_rows)
    return moments


def _describe_series(spec: SeriesSpec, files: Sequence[SourceFile], series: ClosedSeries) -> dict[str, Any]:
    seen = series.values[~series.filled]
    return {
        "workload": "series",
        "sources": [{"name": f.name, "sha256": f.sha256, "bytes": f.num_bytes} for f in files],
        "rows": len(series.values),
        "frequency": series.frequency,
        "first_time": iso(series.times[0]),
        "last_time": iso(series.times[-1]),
        "time_column": spec.time_column,
        "value_column": spec.value_column,
        "extra_columns": [*spec.extra_columns],
        "unit": spec.unit,
        "gaps": {"policy": spec.gaps.policy, "limit": spec.gaps.limit},
        "filled_rows": int(series.filled.sum()),
        "statistics": {name: float(getattr(seen, name)()) for name in ("min", "max", "mean", "std")},
    }


def _describe_targets(
    spec: SeriesSpec,
    times: NDArray[np.int64],
    targets: Targets,
    values: NDArray[np.float32],
    edges: list[float],
) -> dict[str, Any]:
    borders, counts, shares = {}, {}, {}
    for split in SPLITS:
        rows, (start, stop) = targets.of(split), targets.borders[split]
        borders[split] = {
            "start": start,
            "stop": stop,
            "first_time": iso(times[rows[0]]),
            "last_time": iso(times[rows[-1]]),
            "num_targets": len(rows),
        }
        counts[split] = np.bincount(classify(values[rows], edges), minlength=len(edges) + 1).tolist()
        shares[split] = float(exceeds(values[rows], spec.threshold).mean())
    return {
        "borders": borders,
        "threshold": spec.threshold,
        "class_edges": edges,
        "num_classes": len(edges) + 1,
        "class_counts": counts,
        "exceed_share": shares,
    }


def _describe_inputs(spec: SeriesSpec, series: ClosedSeries, train_end: int, features: Moments) -> dict[str, Any]:
    """Describe the model's inputs; the values' moments are those of the observed train rows.

    A std of zero is written as 1: the value or feature then normalizes to 0. `constant_in_train` names them.
    """
    document = spec.features.to_dict()
    names = feature_names(document, spec.extra_columns)
    value = Moments(1)
    value.add(series.values[:train_end][~series.filled[:train_end]].astype(np.float32)[:, None])
    constant = [name for name, same in zip(names, features.constant) if same]
    return {
        "context": spec.context,
        "lookback": spec.features.lookback,
        "features": {"names": names, "spec": document, "constant_in_train": constant},
        "normalization": {
            "value": {"mean": float(value.mean[0]), "std": float(value.std[0])},
            "features": {"mean": features.mean.tolist(), "std": features.std.tolist()},
        },
    }
