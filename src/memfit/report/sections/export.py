"""The exported model: its files, its signature, how close it is to torch, and how to use it."""

from pathlib import Path
from typing import Any

from memfit.files import sha256_file
from memfit.report.blocks import (
    Block,
    Cell,
    Code,
    Column,
    Details,
    Facts,
    Heading,
    Note,
    Row,
    Section,
    Table,
    absent,
    measured,
    pending,
    text_cell,
)
from memfit.report.run_files import Run, mapping, objects
from memfit.report.units import bytes_text, capitalized, finite, significant, time_text

_WITH_INFER = """\
import numpy as np
from infer import Model  # infer.py, in this directory: numpy and onnxruntime are all it needs
outputs = Model().predict(**np.load("sample_inputs.npz"))"""
_WITHOUT = """\
import numpy as np, onnxruntime as ort
session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
outputs = session.run(None, dict(np.load("sample_inputs.npz")))"""
_ELSEWHERE = {"schema", "signature", "parity", "tolerances", "files", "plan", "metrics", "baselines", "versions"}


def export(run: Run) -> Section:
    """Show the bundle that a service would take."""
    title = "Exported model"
    paths = sorted(path for path in run.export_dir.glob("*") if path.is_file())
    if not paths:
        return pending("export", title, "no model has been exported")
    blocks: list[Block] = []
    if run.card:
        blocks += [_facts(run.card), *_signature(run.card), *_parity(run.card)]
    else:
        blocks.append(Note("Not yet: the model card has not been written.", "pending"))
    blocks += [Heading("Files", "in export/"), *_files(paths, run.card)]
    usage = _WITH_INFER if (run.export_dir / "infer.py").is_file() else _WITHOUT
    blocks += [Heading("Use it", "from the export directory"), Code(usage)]
    blocks += _further(run.card)
    return Section("export", title, tuple(blocks))


def _facts(card: dict[str, Any]) -> Facts:
    """List the card's plain entries, and the versions that it was made and tested with."""
    plain = {key: value for key, value in card.items() if isinstance(value, str | int | float)}
    pairs = [
        (capitalized(key), Cell(time_text(value)) if key == "created" else _value(value))
        for key, value in plain.items()
        if key not in _ELSEWHERE
    ]
    return Facts((*pairs, *((name, _value(value)) for name, value in mapping(card, "versions").items())))


def _signature(card: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for key in ("inputs", "outputs"):
        tensors = objects(mapping(card, "signature").get(key))
        if tensors:
            blocks += [Heading(key.capitalize()), _tensors(tensors)]
    return blocks


def _tensors(tensors: list[dict[str, Any]]) -> Table:
    rows = []
    for tensor in tensors:
        shape = tensor.get("shape")
        sizes = " × ".join(map(str, shape)) if isinstance(shape, list) else str(shape)
        rest = [text_cell(tensor.get(key), "none given") for key in ("dtype", "unit", "description")]
        rows.append(Row((Cell(str(tensor.get("name")), tone="code"), Cell(sizes), *rest)))
    return Table(tuple(map(Column, ("Name", "Shape", "dtype", "Unit", "Meaning"))), tuple(rows))


def _parity(card: dict[str, Any]) -> list[Block]:
    """Show how far the ONNX outputs lie from torch's at each tried shape, beside what is allowed."""
    parity = mapping(card, "parity")
    rows = [
        Row(_parity_cells(batch, name, mapping(batch, "outputs", name), mapping(card, "tolerances", name)))
        for batch in objects(parity.get("batches"))
        for name in mapping(batch, "outputs")
    ]
    if not rows:
        return []
    columns = (
        Column("Output"),
        Column("Tried at"),
        Column("Largest difference", number=True),
        Column("relative", number=True),
        Column("Allowed", title="absolute tolerance + relative tolerance × |torch|"),
        Column("Share of what is allowed"),
    )
    beside = f"ONNX on {parity.get('provider')}, {parity.get('num_rows')} real rows"
    return [Heading("Parity with torch", beside), Table(columns, tuple(rows))]


def _parity_cells(
    batch: dict[str, Any], name: str, figures: dict[str, Any], tolerance: dict[str, Any]
) -> tuple[Cell, ...]:
    sizes = ", ".join(f"{dimension} {size}" for dimension, size in mapping(batch, "sizes").items())
    allowed = f"{_small(tolerance.get('atol'))} + {_small(tolerance.get('rtol'))} · |torch|"
    used = finite(figures.get("tolerance_used"))
    share = measured(used, lambda share: f"{significant(share * 100, 2)} %")
    tone = "" if figures.get("within") else "bad"
    return (
        Cell(name, tone="code"),
        Cell(sizes),
        Cell(_small(figures.get("max_absolute"))),
        Cell(_small(figures.get("max_relative"))),
        Cell(allowed),
        Cell(share.text, share.title, tone, used),
    )


def _small(value: Any) -> str:
    """Write an error or a tolerance: 1.2e-07 and 0.05 both read well so."""
    return measured(value, lambda number: f"{number:.2g}").text


def _files(paths: list[Path], card: dict[str, Any]) -> list[Block]:
    """List the files with their hashes, checked against the card."""
    rows, wrong = [], []
    for path in paths:
        recorded, hashed = mapping(card, "files", path.name).get("sha256"), sha256_file(path)
        if recorded not in (None, hashed):
            wrong.append(path.name)
        agrees = Cell("agrees", "the card's hash is that of the file", "good")
        verdict = absent("the card holds no hash of it") if recorded is None else agrees
        verdict = Cell("differs", f"the card says {recorded}", "bad") if path.name in wrong else verdict
        cells = (Cell(path.name), Cell(bytes_text(path.stat().st_size)), verdict, Cell(hashed, tone="code"))
        rows.append(Row(cells))
    missing = sorted(set(mapping(card, "files")) - {path.name for path in paths})
    columns = (Column("File"), Column("Size", number=True), Column("Card"), Column("sha256"))
    notes = [Note(f"Changed since the card was written: {', '.join(wrong)}. Export again.", "bad")] if wrong else []
    notes += [Note(f"On the card but not there: {', '.join(missing)}. Export again.", "bad")] if missing else []
    return [*notes, Table(columns, tuple(rows))]


def _further(card: dict[str, Any]) -> list[Block]:
    """Fold away what else the card holds, whatever its shape."""
    return [
        Details(capitalized(key), (Facts(tuple(_pairs(value))),))
        for key, value in card.items()
        if key not in _ELSEWHERE and isinstance(value, dict | list) and value
    ]


def _pairs(document: Any) -> list[tuple[str, Cell]]:
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    return [(capitalized(str(key)), _value(value)) for key, value in pairs]


def _value(value: Any) -> Cell:
    if isinstance(value, dict):
        return Cell(", ".join(f"{key}: {_value(item).text}" for key, item in value.items()))
    if isinstance(value, list):
        return Cell(", ".join(_value(item).text for item in value[:12]) + ("…" if len(value) > 12 else ""))
    if isinstance(value, float):
        return Cell(f"{value:.4g}")
    text = text_cell(value)
    return Cell(text.text, text.title, "code") if len(text.text) >= 16 and text.text.isalnum() else text
