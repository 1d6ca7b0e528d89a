"""Export a recurrent language model in a process of its own: `python recurrent_language_export.py OUT_DIR SETTINGS`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.export.bundle import export_bundle
from memfit.export.signature import Signature
from memfit.models.language_settings import LanguageSettings
from memfit.models.recurrent_language import RecurrentLanguageModel


class Reader(nn.Module):
    """Read a piece of text: the logits after it, the log-likelihood of its tokens but the first, the state after it."""

    def __init__(self, model: RecurrentLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, after = self.model.stream(tokens, state)
        logits = F.linear(hidden, self.model.head)
        likelihood = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])
        return logits[:, -1], likelihood.sum((1, 2)), after


def main(out_dir: Path, settings: LanguageSettings) -> None:
    torch.manual_seed(0)
    model = RecurrentLanguageModel(settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = ["batch", settings.num_layers, settings.state_channels]
    draw = np.random.default_rng(0)
    card = export_bundle(
        out_dir,
        Reader(model.eval()),
        inputs=[Signature("tokens", ["batch", "time"], "int64"), Signature("state", state)],
        outputs=[
            Signature("logits", ["batch", settings.vocab_size]),
            Signature("log_likelihood", ["batch"]),
            Signature("next_state", state),
        ],
        sample_inputs={
            "tokens": draw.integers(0, settings.vocab_size, (9, 40)),
            "state": draw.normal(size=(9, *state[1:])).astype(np.float32),
        },
        card={"name": "reader"},
        support_files={},
    )
    torch.save(model.state_dict(), out_dir.with_suffix(".pt"))
    print(json.dumps(card))


if __name__ == "__main__":
    main(Path(sys.argv[1]), LanguageSettings(**json.loads(sys.argv[2])))
