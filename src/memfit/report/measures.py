"""What each score means, how it is written, and which direction is better."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from memfit.report.units import finite, number_text, share_text


@dataclass(frozen=True)
class Measure:
    """One score of evaluation.json."""

    label: str
    better: Literal["lower", "higher", ""]
    kind: Literal["unit", "share", "number"]
    meaning: str

    def write(self, value: float) -> str:
        """Write a value of this score, without its unit."""
        return share_text(value) if self.kind == "share" else number_text(value)


MEASURES = {
    "mae": Measure("MAE", "lower", "unit", "Mean absolute error: how far off a prediction is on average."),
    "rmse": Measure("RMSE", "lower", "unit", "Root mean squared error: as MAE, but large misses weigh more."),
    "mse": Measure("MSE", "lower", "number", "Mean squared error, in squared units."),
    "mape": Measure("MAPE", "lower", "share", "Mean absolute error as a share of the true value."),
    "huber": Measure("Huber", "lower", "number", "Half the squared error; beyond a limit, misses weigh linearly."),
    "r2": Measure("R²", "higher", "number", "Share of the variance explained; 0 is no better than the mean."),
    "class_accuracy": Measure("Class accuracy", "higher", "share", "Rows whose class is right."),
    "class_f1": Measure("Class F1", "higher", "number", "F1 over the classes: rare classes count too."),
    "exceeds_accuracy": Measure(
        "Threshold accuracy", "higher", "share", "Rows put on the right side of the threshold."
    ),
    "below_accuracy": Measure(
        "Below accuracy", "higher", "share", "Of the rows truly at or below the threshold, predicted so."
    ),
    "above_accuracy": Measure(
        "Above accuracy", "higher", "share", "Of the rows truly above the threshold, predicted so."
    ),
    "precision": Measure("Precision", "higher", "share", "Of the rows predicted above, truly above."),
    "recall": Measure("Recall", "higher", "share", "Of the rows truly above, predicted above."),
    "loss_risk": Measure("Loss risk", "lower", "share", "Of the rows predicted above, those that were not."),
    "top1_accuracy": Measure("Accuracy", "higher", "share", "Samples whose likeliest class is the true one."),
    "top5_accuracy": Measure(
        "Top-5 accuracy", "higher", "share", "Samples whose true class is among the five likeliest."
    ),
    "nll": Measure("Log loss", "lower", "number", "Mean negative log-likelihood of what is true, in nats."),
    "perplexity": Measure("Perplexity", "lower", "number", "Among how many equally likely tokens it is undecided."),
    "bits_per_byte": Measure(
        "Bits per byte", "lower", "number", "What a byte of text would take, compressed; whatever the tokenizer."
    ),
    "token_accuracy": Measure("Token accuracy", "higher", "share", "Tokens that were the likeliest."),
    "calibration_error": Measure(
        "Calibration error", "lower", "share", "How far stated probabilities are from the share that comes true."
    ),
}


def measure(name: str) -> Measure:
    """Return what is known about a score; an unknown one is a plain number of which neither way is better.

    `<name>_step_<k>` is that score of step k of a forecast.
    """
    whole, _, step = name.rpartition("_step_")
    if whole in MEASURES and step.isdecimal():
        return replace(MEASURES[whole], label=f"{MEASURES[whole].label}, step {step}", meaning="")
    return MEASURES.get(name) or Measure(name.replace("_", " "), "", "number", "")


def best_of(name: str, values: list[Any]) -> float | None:
    """Return the best of a score's values, or None where none is better or worse."""
    known = [value for value in map(finite, values) if value is not None]
    better = measure(name).better
    if not better or not known or (len(known) > 1 and len(set(known)) == 1):
        return None
    return min(known) if better == "lower" else max(known)


def improvement(name: str, model: float, baseline: float) -> float:
    """Return by which share of the baseline the model is better (negative: worse); infinite beside a perfect 0."""
    gain = baseline - model if measure(name).better == "lower" else model - baseline
    if baseline == 0:
        return math.copysign(math.inf, gain) if gain else 0.0
    return gain / abs(baseline)
