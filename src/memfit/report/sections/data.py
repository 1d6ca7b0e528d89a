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
from memfit.report.class_names import class_names
from memfit.report.run_files import Run, mapping, objects
from memfit.report.units import bytes_text, count_text, finite, number_text, setting_text, share_text, time_text

SPLITS = ("train", "validation", "test")
MAX_CLASSES = 20
_TECHNICAL = ("schema", "checksum", "code_version", "fingerprint")


def data(run: Run) -> Section:
    """Sum up the manifest of the prepared data."""
    title = "Data"
    manifest = run.manifest
    if not manifest:
        return pending("data", title, "no prepared data is recorded")
    if manifest.get("workload", "series") != "series":
        return Section("data", title, (_plain_facts(manifest), *_plain_splits(run)))
    blocks: list[Block] = [_facts(manifest, run.unit), Heading("Splits", "in order of time"), _splits(run)]
    sources = objects(manifest.get("sources"))
    if sources:
        blocks += [Heading("Sources"), _sources(sources)]
    features = _features(manifest)
    blocks += [features] if features else []
    return Section("data", title, tuple(blocks))


def _plain_facts(manifest: dict[str, Any]) -> Facts:
    """Show what is a single value, or a few, under its own name."""
    found = {**manifest, **mapping(manifest, "data"), **mapping(manifest, "duplicates")}
    shown = []
    for name, value in found.items():
        few = isinstance(value, list) and 0 < len(value) <= 4 and not isinstance(value[0], dict | list)
        if name not in _TECHNICAL and (few or isinstance(value, str | int | float)):
            text = " x ".join(map(str, value)) if few else str(value)
            shown.append((name.replace("_", " ").capitalize(), Cell(text)))
    return Facts((*shown, ("Fingerprint", Cell(str(manifest.get("fingerprint")), tone="code"))))


def _plain_splits(run: Run) -> tuple[Block, ...]:
    """Count samples and, where there are few, classes of each split."""
    if "num_tokens" in run.manifest:
        return Heading("Splits", "by document"), _token_splits(run.manifest)
    borders, counts = mapping(run.manifest, "borders"), {name: _counts(run.manifest, name) for name in SPLITS}
    if not borders:
        return ()
    num_classes = max(map(len, counts.values()))
    names = class_names(run, num_classes) if num_classes <= MAX_CLASSES else []
    columns = (Column("Split"), Column("Samples", number=True), *(Column(name, number=True) for name in names))
    rows = []
    for name in SPLITS:
        start, stop = (finite(mapping(borders, name).get(key)) for key in ("start", "stop"))
        size = stop - start if start is not None and stop is not None else None
        cells = [measured(count, count_text, "not recorded") for count in [*counts[name], *[None] * len(names)]]
        rows.append(Row((Cell(name), measured(size, count_text, "not recorded"), *cells[: len(names)])))
    return Heading("Splits"), Table(columns, tuple(rows))


def _token_splits(manifest: dict[str, Any]) -> Table:
    """Count documents, tokens and bytes of each split of a corpus."""
    kinds = ("num_documents", "num_tokens", "num_bytes")
    columns = (Column("Split"), *(Column(kind.removeprefix("num_").capitalize(), number=True) for kind in kinds))
    rows = [
        Row((Cell(split), *(measured(mapping(manifest, kind).get(split), count_text) for kind in kinds)))
        for split in SPLITS
    ]
    return Table(columns, tuple(rows))


def _facts(manifest: dict[str, Any], unit: str) -> Facts:
    low, high = (finite(mapping(manifest, "statistics").get(key)) for key in ("min", "max"))
    fitted = mapping(manifest, "normalization", "value")
    mean, std = (finite(fitted.get(key)) for key in ("mean", "std"))
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
            ("Range", _pair(low, "to", high, unit, "of all rows")),
            ("Normalization", _pair(mean, "±", std, unit, "mean and deviation of the train rows")),
            ("Threshold", measured(manifest.get("threshold"), lambda it: f"{setting_text(it)} {unit}", "not set")),
            ("Gaps filled", measured(manifest.get("filled_rows"), count_text, "not recorded")),
            ("Gap policy", text_cell(policy)),
            ("Longest window", measured(manifest.get("context"), lambda rows: f"{rows:,.0f} rows", "not recorded")),
            ("Features", Cell(count_text(len(names))) if isinstance(names, list) else absent("not recorded")),
            ("Fingerprint", Cell(str(manifest.get("fingerprint") or "–"), "of sources, settings and code", "code")),
        )
    )


def _pair(left: float | None, between: str, right: float | None, unit: str, title: str) -> Cell:
    if left is None or right is None:
        return absent("not recorded")
    return Cell(f"{number_text(left)} {between} {number_text(right)} {unit}", title)


def _moment(value: Any) -> Cell:
    return Cell(time_text(value)) if value else absent("not recorded")


def _splits(run: Run) -> Table:
    manifest = run.manifest
    counts = {name: _counts(manifest, name) for name in SPLITS}
    num_classes = max(map(len, counts.values()))
    num_classes = num_classes if num_classes <= MAX_CLASSES else 0
    names = class_names(run, num_classes)[:num_classes]
    columns = (
        Column("Split"),
        Column("Targets", number=True),
        Column("First"),
        Column("Last"),
        Column("Above threshold", number=True),
        *(Column(name, number=True) for name in names),
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
