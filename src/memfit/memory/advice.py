"""What would fit where a script ran out of memory: estimates from what was held then, each saying what it rests on."""

from math import ceil
from typing import Any

from memfit.memory.plan import MIB

HEADROOM = 0.03
"""Share of the capacity that stays free, as in plans."""
AUTOCAST_SHARE = 0.55
"""Rough: activations under 16-bit autocast are about half; norms, softmax and losses stay at 32 bits."""
HEAP_SLACK = 1.0
"""Rough, on the safe side: on a CPU, tensors below 32 MiB come from the C library's heap, whose holes were measured at
up to two thirds of what the tensors take."""
_BASES = {
    "repeated": "from the whole forward pass, repeated on tensors without memory",
    "backward": "from the activations alive when the backward pass began",
    "partial": "from the part of the forward pass that ran, so too low",
}


def needs(report: dict[str, Any]) -> dict[str, Any]:
    """Divide one step's predicted bytes into what stays whatever the batch is, and what scales with it.

    fixed_bytes: the process without tensors, parameters, buffers, all gradients, all optimizer state, other tensors.
    batch_bytes: the batch, a whole forward pass's activations, and twice the largest of them for the backward pass; on
    a CPU with the heap's slack.
    """
    held, full = report["categories"], report["full_forward"]
    activations, basis = held["activations"], "partial"
    largest = report["largest_activation_bytes"]
    if full is not None:
        activations, largest, basis = full["categories"]["activations"], full["largest_activation_bytes"], "repeated"
    elif report["phase"] in ("backward", "optimizer", "between steps") and report["forward_bytes"]:
        activations, basis = report["forward_bytes"], "backward"
    request = 0 if report["phase"] in ("optimizer", "setup") else report["request_bytes"] or 0
    batch = min(report["batch_bytes"] or 0, held["batch_and_other"])
    slack = 1 + HEAP_SLACK if report["device"] == "cpu" else 1
    scaling = int((batch + activations + max(2 * largest, request)) * slack)
    fixed = {
        "process": max(report["process_bytes"] - report["tensor_bytes"], 0),
        "parameters": held["parameters"],
        "buffers": held["buffers"],
        "gradients": max(held["gradients"], report["trainable_bytes"]),
        "optimizer_state": max(held["optimizer_state"], report["expected_state_bytes"]),
        "other": held["batch_and_other"] - batch,
    }
    return {
        "fixed_bytes": sum(fixed.values()),
        "fixed": fixed,
        "activation_bytes": activations,
        "batch_bytes": scaling,
        "basis": basis,
    }


def advise(report: dict[str, Any]) -> list[dict[str, Any]]:
    """List what would lower the peak, as {"lever", "predicted_bytes", "fits", "text"}, the exact ones first."""
    if not report["trainable_bytes"] or not report["capacity_bytes"]:
        return [_planning()]
    need, limit = needs(report), int(report["capacity_bytes"] * (1 - HEADROOM))
    advice = [_accumulation(report, need, limit)]
    if need["fixed_bytes"] < limit:
        advice += [_checkpointing(report, need, limit), _mixed_precision(need, limit)]
    return [*advice, _planning()]


def _accumulation(report: dict[str, Any], need: dict[str, Any], limit: int) -> dict[str, Any]:
    fixed, scaling, size = need["fixed_bytes"], need["batch_bytes"], report["batch_size"]
    if fixed >= limit:
        parts = ", ".join(f"{name.replace('_', ' ')} {_mib(amount)}" for name, amount in need["fixed"].items())
        text = (
            f"No batch size fits, by estimate: what does not depend on the batch comes to {_mib(fixed)} of "
            f"{_mib(report['capacity_bytes'])} ({parts}). Take an optimizer with less state (SGD without momentum has "
            "none), freeze layers, make the model smaller, or get more memory."
        )
        return {"lever": "fixed", "predicted_bytes": fixed, "fits": False, "text": text, "accumulation_steps": None}
    share = min((limit - fixed) / max(scaling, 1), 0.5)
    micro = None if not size else max(int(size * share), 1)
    steps = ceil(size / micro) if size and micro else ceil(1 / share)
    part = micro / size if size and micro else 1 / steps
    peak = fixed + int(scaling * part)
    cut = f"micro-batches of {micro} instead of {size}, {steps} of them" if micro else f"{steps} micro-batches"
    text = (
        f"Gradient accumulation at the same effective batch: {cut} per optimizer step, each loss divided by {steps} "
        f"({part:.0%} of the present batch; with a short last one, weight by samples). About {_mib(peak)}: "
        f"{_mib(fixed)} do not depend on the batch, {_mib(scaling)} scale with it "
        f"({_BASES[need['basis']]}). An estimate."
    )
    return {
        "lever": "accumulation",
        "predicted_bytes": peak,
        "fits": peak <= limit,
        "text": text,
        "micro_batch_size": micro,
        "accumulation_steps": steps,
    }


def _checkpointing(report: dict[str, Any], need: dict[str, Any], limit: int) -> dict[str, Any]:
    source = report["full_forward"] or report
    by_module = {row["module"]: row["categories"].get("activations", 0) for row in source["modules"]}
    kind, blocks = _heaviest(source["blocks"], by_module)
    if not blocks:
        text = (
            "Activation checkpointing (torch.utils.checkpoint) around the modules that hold the most activations: "
            "their inner ones are computed again in the backward pass, for about a third more time. No repeated block "
            "was found to estimate with."
        )
        return {"lever": "checkpointing", "predicted_bytes": None, "fits": None, "text": text}
    inside = sum(blocks.values())
    saved = int((inside - max(blocks.values())) * 0.9)
    peak = need["fixed_bytes"] + max(need["batch_bytes"] - saved, 0)
    text = (
        f"Activation checkpointing around each {kind} ({len(blocks)} of them hold {_mib(inside)}): about "
        f"{_mib(peak)} at the whole batch, for about a third more time. A rough estimate: one block at a time, and a "
        "tenth of the rest."
    )
    return {"lever": "checkpointing", "predicted_bytes": peak, "fits": peak <= limit, "text": text}


def _heaviest(kinds: dict[str, list[str]], by_module: dict[str, int]) -> tuple[str, dict[str, int]]:
    best: tuple[str, dict[str, int]] = ("", {})
    for kind, paths in kinds.items():
        held = {
            path: sum(size for name, size in by_module.items() if f"{name}.".startswith(f"{path}.")) for path in paths
        }
        if sum(held.values()) > sum(best[1].values()):
            best = kind, held
    return best


def _mixed_precision(need: dict[str, Any], limit: int) -> dict[str, Any]:
    saved = int(need["activation_bytes"] * (1 - AUTOCAST_SHARE))
    copies = need["fixed"]["parameters"] // 2
    peak = need["fixed_bytes"] + need["batch_bytes"] - saved + copies
    text = (
        f"Mixed precision (torch.autocast, bfloat16): about {_mib(peak)} at the whole batch, if it is not on already; "
        f"activations to about {AUTOCAST_SHARE:.0%}, and 16-bit copies of the weights. A rough estimate; it changes "
        "the arithmetic."
    )
    return {"lever": "mixed_precision", "predicted_bytes": peak, "fits": peak <= limit, "text": text}


def _planning() -> dict[str, Any]:
    text = (
        "Let memfit find and prove it: memfit.plan(memfit.TrainingProgram(build_model=..., make_batch=lambda n, "
        "seq_len=None: ..., loss=..., optimizer=...), global_batch_size=..., budget=..., device=...) measures layouts "
        "at the same effective batch and returns one that ran within the budget."
    )
    return {"lever": "plan", "predicted_bytes": None, "fits": None, "text": text}


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"
