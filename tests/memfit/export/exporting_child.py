"""Small nets and what is exported of them, each case in its own process: `python exporting_child.py CASE OUT_DIR`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from memfit.errors import ExportError
from memfit.export.bundle import export_bundle
from memfit.export.signature import Signature

CONTEXT = 12
FEATURES = 2
FEATURES_CODE = '''"""Two causal features, for the tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Window:
    rows: list[int]


def compute_features(times_ns, values, extras, threshold, spec):
    window = Window([spec["window"]]).rows[0]
    features = np.full((len(values), 2), np.nan, np.float32)
    for i in range(window - 1, len(values)):
        features[i] = values[i - window + 1 : i + 1].max(), extras[i, 0] - threshold
    return features
'''


class SeriesNet(nn.Module):
    """An MLP over history and features with normalization and both kinds of probability inside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(900.0))
        self.register_buffer("std", torch.tensor(120.0))
        self.body = nn.Sequential(nn.Linear(CONTEXT + FEATURES, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 5))

    def forward(self, history, features):
        rows = self.body(torch.cat([(history - self.mean) / self.std, features / 1000], dim=1))
        return rows[:, 0] * self.std + self.mean, rows[:, 1:4].softmax(dim=1), rows[:, 4].sigmoid()


class AttentionNet(nn.Module):
    """A Transformer encoder layer, and a weight-normed dilated convolution."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(1, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 3, padding=4, dilation=2))

    def forward(self, history):
        rows = self.encoder(self.into(history[:, :, None]))
        return (self.conv(rows.transpose(1, 2))[:, :, :-4].mean(dim=2),)


class TokenNet(nn.Module):
    """Causal attention over tokens: integer input, two named dimensions, the output keeps both."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.qkv = nn.Linear(16, 48)

    def forward(self, tokens):
        batch, time = tokens.shape
        q, k, v = self.qkv(self.embed(tokens)).reshape(batch, time, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (mixed.transpose(1, 2).flatten(2).log_softmax(dim=-1),)


class OtherWhenExported(SeriesNet):
    """What is exported is not what runs in torch."""

    def forward(self, history, features):
        value, classes, exceeds = super().forward(history, features)
        return value + 0.5 * torch.compiler.is_exporting(), classes, exceeds


class FrozenBatch(nn.Module):
    """The trace sees a constant where the batch should be."""

    def forward(self, history):
        return (history.reshape(int(history.shape[0]), -1).sum(dim=1) + torch.zeros(2),)


SERIES_INPUTS = [
    Signature("history", ["batch", CONTEXT], "float32", "hPa", "The newest values, oldest first."),
    Signature("features", ["batch", FEATURES], "float32", "", "Features of the newest row."),
]
SERIES_OUTPUTS = [
    Signature("value", ["batch"], "float32", "hPa", "The next value."),
    Signature("class_probabilities", ["batch", 3]),
    Signature("exceeds_probability", ["batch"]),
]
SERIES_SECTION = {
    "context": CONTEXT,
    "lookback": 4,
    "threshold": 950.0,
    "feature_spec": {"window": 4},
    "extra_columns": ["wind"],
    "time_column": "time",
    "value_column": "pressure",
    "class_edges": [850.0, 950.0],
    "unit": "hPa",
    "frequency": "1h",
}


def sample_rows(rows=9):
    random = np.random.default_rng(3)
    history = random.normal(900, 120, (rows, CONTEXT)).astype(np.float32)
    features = np.stack([history[:, -4:].max(axis=1), random.normal(0, 5, rows)], axis=1).astype(np.float32)
    return {"history": history, "features": features}


def export_series(out_dir, module=None, **changes):
    features = out_dir.parent / "features.py"
    features.write_text(FEATURES_CODE)
    arguments = {
        "inputs": SERIES_INPUTS,
        "outputs": SERIES_OUTPUTS,
        "sample_inputs": sample_rows(),
        "card": {"name": "pressure", "metrics": {"mae": 1.25}, "series": SERIES_SECTION},
        "support_files": {"features.py": features},
    }
    return export_bundle(out_dir, module or SeriesNet(), **(arguments | changes))


def export_one_input(out_dir, module, outputs, **changes):
    history = {"history": sample_rows()["history"]}
    arguments = {"inputs": SERIES_INPUTS[:1], "outputs": outputs, "sample_inputs": history} | changes
    return export_bundle(out_dir, module, card={"name": "net"}, support_files={}, **arguments)


def export_tokens(out_dir):
    tokens = np.random.default_rng(4).integers(0, 50, (5, 20))
    return export_one_input(
        out_dir,
        TokenNet(),
        [Signature("log_probabilities", ["batch", "time", 16])],
        inputs=[Signature("tokens", ["batch", "time"], "int64")],
        sample_inputs={"tokens": tokens},
    )


FAILING = {
    "differs": lambda out: export_series(out, OtherWhenExported()),
    "differs_within_stated": lambda out: export_series(
        out.with_name("wide"), OtherWhenExported(), tolerances={"atol": 0.6, "rtol": 0.0}
    ),
    "frozen_batch": lambda out: export_one_input(out, FrozenBatch(), [Signature("sum", ["batch"])]),
    "wrong_output_shape": lambda out: export_one_input(out, nn.Identity(), [Signature("y", ["batch", 3])]),
    "not_a_tuple": lambda out: export_one_input(out, nn.Linear(CONTEXT, 1), [Signature("y", ["batch", 1])]),
    "nan_in_card": lambda out: export_series(out, card={"name": "x", "metrics": {"mae": float("nan")}}),
}


def main(case, out_dir):
    torch.manual_seed(0)
    if case == "failing":
        return {name: attempt(run, out_dir) for name, run in FAILING.items()}
    if case == "series":
        phases = []
        return {"card": export_series(out_dir, on_progress=phases.append), "phases": phases}
    pooled = [Signature("pooled", ["batch", 16])]
    return {
        "attention": export_one_input(out_dir / "attention", AttentionNet(), pooled),
        "tokens": export_tokens(out_dir / "tokens"),
    }


def attempt(run, out_dir):
    try:
        run(out_dir)
    except ExportError as error:
        return str(error)
    return "exported"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
