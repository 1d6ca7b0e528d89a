"""What the model learned from: sources, rows, splits, normalization, features."""

from typing import Any

from memfit.report.blocks import (
    Block,
    Cell,
    Column,
    Details,
    Facts,
    Heading,
    Row,
    Section,
    Table,
    absent,
    measured,
    pending,
    text_cell,
)
from memfit.report.run_files import Run, mapping, objects
from memfit.report.units import bytes_text, count_text, finite, number_text, setting_text, share_text, time_text

SPLITS = ("train", "validation", "test")
MAX_CLASSES = 20


def data(run: Run) -> Section:
    """Sum up the manifest of the prepared data."""
    title = "Data"
    manifest = run.manifest
    if not manifest:
        return pending("data", title, "no prepared data is recorded")
    blocks: list[Block] = [_facts(manifest, run.unit), Heading("Splits", "in order of time"), _splits(manifest)]
    sources = objects(manifest.get("sources"))
    if sources:
        blocks += [Heading("Sources"), _sources(sources)]
    features = _features(manifest)
    blocks += [features] if features else []
    return Section("data", title, tuple(blocks))


def _facts(manifest: dict[str, Any], unit: str) -> Facts:
    def figure(value: Any) -> str:
        return measured(value, lambda number: f"{number_text(number)} {unit}".strip(), "not recorded").text

    statistics = mapping(manifest, "statistics")
    names = mapping(manifest, "features").get("names")
    gaps = mapping(manifest, "gaps")
    policy = f"{gaps.get('policy')}, limit {gaps.get('limit')}" if gaps.get("limit") else gaps.get("policy")
    return Facts(
        (
            ("Target", text_cell(manifest.get("value_column"))),
            ("Rows", measured(manifest.get("rows"), count_text, "not recorded")),
            ("Every", text_cell(manifest.get("frequency"))),
            ("From", _moment(manifest.get("first_time"))),
            ("To", _moment(manifest.get("last_time"))),
            ("Range", Cell(f"{figure(statistics.get('min'))} to {figure(statistics.get('max'))}")),
            ("Normalization", _normalization(manifest, unit)),
            (
                "Threshold",
                measured(manifest.get("threshold"), lambda value: f"{setting_text(value)} {unit}".strip(), "not set"),
            ),
            ("Gaps filled", measured(manifest.get("filled_rows"), count_text, "not recorded")),
            ("Gap policy", text_cell(policy)),
            ("Longest window", measured(manifest.get("context"), lambda rows: f"{rows:,.0f} rows", "not recorded")),
            ("Features", Cell(count_text(len(names))) if isinstance(names, list) else absent("not recorded")),
            ("Fingerprint", Cell(str(manifest.get("fingerprint") or "–"), "of sources, settings and code", "code")),
        )
    )


def _normalization(manifest: dict[str, Any], unit: str) -> Cell:
    fitted = mapping(manifest, "normalization", "value")
    mean, std = finite(fitted.get("mean")), finite(fitted.get("std"))
    if mean is None or std is None:
        return absent("not recorded")
    return Cell(f"{setting_text(mean)} ± {setting_text(std)} {unit}".strip(), "mean and deviation of the train rows")


def _moment(value: Any) -> Cell:
    return Cell(time_text(value)) if value else absent("not recorded")


def _splits(manifest: dict[str, Any]) -> Table:
    counts = {name: _counts(manifest, name) for name in SPLITS}
    num_classes = max(map(len, counts.values()))
    num_classes = num_classes if num_classes <= MAX_CLASSES else 0
    columns = (
        Column("Split"),
        Column("Targets", number=True),
        Column("First"),
        Column("Last"),
        Column("Above threshold", number=True),
        *(Column(f"class {index}", number=True) for index in range(num_classes)),
    )
    rows = []
    for name in SPLITS:
        border = mapping(manifest, "borders", name)
        cells = (
            Cell(name),
            measured(border.get("num_targets"), count_text, "not recorded"),
            _moment(border.get("first_time")),
            _moment(border.get("last_time")),
            measured(mapping(manifest, "exceed_share").get(name), share_text, "not recorded"),
        )
        padded = [*counts[name], *[None] * num_classes][:num_classes]
        rows.append(Row((*cells, *(measured(count, count_text, "not recorded for this split") for count in padded))))
    return Table(columns, tuple(rows))


def _counts(manifest: dict[str, Any], split: str) -> list[Any]:
    counts = mapping(manifest, "class_counts").get(split)
    return counts if isinstance(counts, list) else []


def _sources(sources: list[dict[str, Any]]) -> Table:
    rows = [
        Row(
            (
                text_cell(source.get("name")),
                measured(source.get("bytes"), bytes_text, "not recorded"),
                Cell(str(source.get("sha256") or "–"), tone="code"),
            )
        )
        for source in sources
    ]
    return Table((Column("File"), Column("Size", number=True), Column("sha256")), tuple(rows))


def _features(manifest: dict[str, Any]) -> Details | None:
    names = mapping(manifest, "features").get("names")
    if not isinstance(names, list) or not names:
        return None
    fitted = mapping(manifest, "normalization", "features")
    figures = [fitted[key] if isinstance(fitted.get(key), list) else [] for key in ("mean", "std")]
    padded = [[*column, *[None] * len(names)][: len(names)] for column in figures]
    rows = [
        Row((Cell(str(name)), measured(finite(mean), number_text), measured(finite(std), number_text)))
        for name, mean, std in zip(names, *padded, strict=True)
    ]
    columns = (Column("Feature"), Column("Mean", number=True), Column("Standard deviation", number=True))
    return Details(f"The {len(names)} features, and their normalization", (Table(columns, tuple(rows)),))
