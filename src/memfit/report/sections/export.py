"""The exported model: its files, its signature, how close it is to torch, and how to use it."""

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
    pending,
    text_cell,
)
from memfit.report.run_files import Run, mapping, objects
from memfit.report.units import bytes_text

_USAGE = """\
import numpy as np, onnxruntime as ort
session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
outputs = session.run(None, dict(np.load("sample_inputs.npz")))"""


def export(run: Run) -> Section:
    """Show the bundle that a service would take."""
    title = "Exported model"
    files = sorted(path for path in run.export_dir.glob("*") if path.is_file())
    if not files:
        return pending("export", title, "no model has been exported")
    blocks: list[Block] = [_integrity(run)]
    if run.card:
        blocks += [_facts(run), *_signature(run.card), *_parity(run.card)]
    else:
        blocks.append(Note("Not yet: the model card has not been written.", "pending"))
    sizes = [Row((Cell(path.name), Cell(bytes_text(path.stat().st_size)))) for path in files]
    blocks += [Heading("Files", "in export/"), Table((Column("File"), Column("Size", number=True)), tuple(sizes))]
    blocks += [Heading("Use it", "in the export directory"), Code(_USAGE)]
    return Section("export", title, tuple(blocks))


def _integrity(run: Run) -> Note:
    """Compare the ONNX file with the hash on its card."""
    path = run.export_dir / "model.onnx"
    if not path.is_file():
        return Note("Not yet: model.onnx has not been written.", "pending")
    hashed, recorded = sha256_file(path), _sha256(run.card)
    if recorded is None:
        return Note(f"model.onnx has sha256 {hashed}; the card names none to compare with.", "warn")
    if hashed != recorded:
        return Note(f"model.onnx has sha256 {hashed}, but its card says {recorded}. Export it again.", "bad")
    return Note("model.onnx is the file that its card describes: the sha256 agrees.", "good")


def _sha256(card: dict[str, Any]) -> str | None:
    """Find the ONNX file's hash: on the card itself, or in its table of files."""
    recorded = card.get("sha256") or mapping(card, "files").get("model.onnx")
    if isinstance(recorded, dict):
        recorded = recorded.get("model.onnx") or recorded.get("sha256")
    return recorded if isinstance(recorded, str) else None


def _facts(run: Run) -> Facts:
    card = run.card
    plain = {
        key.replace("_", " ").capitalize(): _short(value)
        for key, value in card.items()
        if isinstance(value, str | int | float) and key not in ("schema", "sha256")
    }
    return Facts((*plain.items(), ("sha256", _short(_sha256(card)))))


def _short(value: Any) -> Cell:
    if isinstance(value, float):
        return Cell(_figure(value))
    text = str(value)
    return Cell(text, tone="code") if len(text) >= 16 and text.isalnum() else text_cell(value)


def _signature(card: dict[str, Any]) -> list[Block]:
    """List inputs and outputs, whichever columns the card has for them."""
    holder = mapping(card, "signature") or card
    blocks: list[Block] = []
    for key in ("inputs", "outputs"):
        tensors = _tensors(holder.get(key))
        if tensors:
            blocks += [Heading(key.capitalize()), _tensor_table(tensors)]
    return blocks


def _tensors(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [{"name": name, **(about if isinstance(about, dict) else {})} for name, about in value.items()]
    return objects(value)


def _tensor_table(tensors: list[dict[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for tensor in tensors for key in tensor))
    rows = [Row(tuple(_tensor_cell(key, tensor.get(key)) for key in keys)) for tensor in tensors]
    return Table(tuple(Column(key.replace("_", " ").capitalize()) for key in keys), tuple(rows))


def _tensor_cell(key: str, value: Any) -> Cell:
    if isinstance(value, list):
        joined = " × " if key == "shape" else ", "
        shown = [str(item) for item in value[:12]]
        return Cell(joined.join(shown) + ("…" if len(value) > 12 else ""))
    return text_cell(value, "none") if not isinstance(value, dict) else Cell(", ".join(f"{k} {v}" for k, v in value.items()))


def _parity(card: dict[str, Any]) -> list[Block]:
    """Show how far the ONNX outputs lie from torch's, and every other group of the card, folded."""
    blocks: list[Block] = []
    for key in ("parity", "tolerances"):
        if isinstance(card.get(key), dict | list):
            blocks += [Heading("Parity with torch" if key == "parity" else "Tolerances"), _nested(card[key])]
    shown = {"parity", "tolerances", "signature", "inputs", "outputs", "plan", "metrics", "baselines", "files"}
    for key, value in card.items():
        if key not in shown and isinstance(value, dict | list) and value:
            blocks.append(Details(key.replace("_", " ").capitalize(), (_nested(value),)))
    return blocks


def _nested(document: Any) -> Table | Facts:
    """Lay out JSON of unknown shape: rows of the same keys as a table, the rest as names and values."""
    if isinstance(document, dict) and document and all(isinstance(value, dict) for value in document.values()):
        document = [{"name": key, **value} for key, value in document.items()]
    if isinstance(document, list) and objects(document) == document and document:
        keys = list(dict.fromkeys(key for item in document for key in item))
        rows = [Row(tuple(_value(item.get(key)) for key in keys)) for item in document]
        return Table(tuple(Column(key.replace("_", " ")) for key in keys), tuple(rows))
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    return Facts(tuple((str(key).replace("_", " "), _value(value)) for key, value in pairs))


def _value(value: Any) -> Cell:
    if value is None:
        return absent("not recorded")
    if isinstance(value, float):
        return Cell(_figure(value))
    if isinstance(value, dict):
        return Cell(", ".join(f"{key}: {_value(item).text}" for key, item in value.items()))
    if isinstance(value, list):
        return Cell(", ".join(_value(item).text for item in value[:12]) + ("…" if len(value) > 12 else ""))
    return _short(value)


def _figure(value: float) -> str:
    """Write an error or a tolerance: 1.2e-07 and 0.05 both read well so."""
    return f"{value:.3g}"


