"""Text from a language model, token by token. Shipped in bundles as it is: `python generate.py --prompt "..."`.

Needs numpy; the command line at the end also needs infer.py, onnxruntime and tokenizers.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Logits = np.ndarray[Any, Any]
NextLogits = Callable[[Sequence[int]], Logits]
"""Told the tokens that are new since the last call, returns the logits [V] of the one that follows them."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises ValueError for a setting that cannot work."""

    temperature: float = 0.8
    """What the logits are divided by; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Choose among so many of the likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (Holtzman et al., 2020)."""
    seed: int = 0
    """The same seed, prompt and settings give the same text."""

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


def choose(logits: Logits, sampling: Sampling, random: np.random.Generator) -> int:
    """Choose a token from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k or None]
    chances = np.exp(scaled[order] - scaled[order[0]])
    chances /= chances.sum()
    kept = int(np.searchsorted(np.cumsum(chances), sampling.top_p * (1 - 1e-12))) + 1
    chances = chances[:kept] / chances[:kept].sum()
    return int(order[random.choice(len(chances), p=chances)])


def generate(
    next_logits: NextLogits, prompt: Sequence[int], sampling: Sampling, max_tokens: int, stop: int
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that continue a prompt of one token or more, up to the token `stop`."""
    random = np.random.default_rng(sampling.seed)
    new = list(prompt)
    for _ in range(max_tokens):
        token = choose(next_logits(new), sampling, random)
        if token == stop:
            return
        yield token
        new = [token]


class TextModel:
    """An exported language model and its tokenizer."""

    def __init__(self, model: Any, folder: Path) -> None:
        """Take an `infer.Model` of the bundle in `folder`. Raises ValueError where it is no language model."""
        from tokenizers import Tokenizer  # only here: who scores tokens needs none

        if "language" not in model.card or not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder}: expected the bundle of a language model, with tokenizer.json; it has none")
        self._model, self._facts = model, model.card["language"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True

    def generate(self, prompt: str, sampling: Sampling, max_tokens: int) -> Iterator[str]:
        """Yield the text that continues a prompt, in pieces; an empty prompt begins a document."""
        eot = self._facts["eot"]
        tokens = [eot, *self._tokenizer.encode(prompt, add_special_tokens=False).ids]
        known, told = [], ""
        for token in generate(self._next_logits(), tokens, sampling, max_tokens, eot):
            known.append(token)
            text = self._tokenizer.decode(known)
            if not text.endswith("\ufffd"):  # a character may take several tokens
                yield text[len(told) :]
                told = text
        if known and (text := self._tokenizer.decode(known)) != told:
            yield text[len(told) :]

    def _next_logits(self) -> NextLogits:
        """Stream through a model with a state; one without reads everything again, as much as it was trained on."""
        shape = self._facts["state_shape"]
        state, seen = (np.zeros((1, *shape), np.float32) if shape else None), list[int]()

        def next_logits(new: Sequence[int]) -> Logits:
            nonlocal state
            if state is None:
                seen.extend(new)
                tokens = np.array([seen[-self._facts["seq_len"] :]], np.int64)
                return np.asarray(self._model.predict(tokens=tokens)["logits"][0])
            out = self._model.predict(tokens=np.array([new], np.int64), state=state)
            state = out["next_state"]
            return np.asarray(out["logits"][0])

        return next_logits


def main() -> None:
    """Continue a prompt with the model beside this file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--prompt", default="", help="text to continue; none begins a document")
    parser.add_argument("--max-tokens", type=int, default=100, help="most tokens to generate (default 100)")
    for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("seed", int)):
        default = getattr(Sampling, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"default {default}")
    given = vars(parser.parse_args())
    folder = Path(__file__).parent
    infer = importlib.import_module("infer")  # the bundle's own
    prompt, max_tokens = given.pop("prompt"), given.pop("max_tokens")
    try:
        for piece in TextModel(infer.Model(folder), folder).generate(prompt, Sampling(**given), max_tokens):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
