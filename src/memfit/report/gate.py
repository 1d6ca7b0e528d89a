"""What the gate decided, in one sentence."""

from typing import Any

from memfit.report.units import finite


def gate_sentence(gate: dict[str, Any]) -> str:
    """Say whether a model passed, and against what; `gate` is evaluation.json's, or what is left of it."""
    if gate.get("passed") is not True:
        reasons = gate.get("reasons")
        told = "; ".join(map(str, reasons)) if isinstance(reasons, list) and reasons else "no reason is recorded"
        return f"Gate not passed: {told}."
    known = _items(gate.get("rivals"))
    rivals = [f"{name.replace('_', ' ')} by {_figure(rival, 'better_by')}" for name, rival in known]
    against = f", better than {', '.join(rivals)}" if rivals else ""
    return f"Gate passed with {str(gate.get('metric')).replace('_', ' ')} {_figure(gate, 'score')}{against}."


def _items(rivals: Any) -> list[tuple[str, Any]]:
    return list(rivals.items()) if isinstance(rivals, dict) else []


def _figure(document: Any, name: str) -> str:
    value = finite(document.get(name)) if isinstance(document, dict) else None
    return "?" if value is None else f"{value:.4g}"
