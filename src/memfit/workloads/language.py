"""The language workload: the next token from those before it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.chunked_loss import chunk_rows, linear_cross_entropy
from memfit.data.prepared_corpus import PreparedCorpus
from memfit.data.spec import build, require
from memfit.data.splits import SPLITS
from memfit.data.token_samples import IGNORED, TokenSamples
from memfit.metrics.language import language_scores
from memfit.models.decoder_language import BLOCKS as DECODER_BLOCKS
from memfit.models.decoder_language import DecoderLanguageModel
from memfit.models.experts_language import Backbone, ExpertsLanguageModel
from memfit.models.growth import become_backbone, grow
from memfit.models.language import LanguageModel
from memfit.models.language_settings import LanguageSettings
from memfit.models.low_rank import add_low_rank, merged
from memfit.models.recurrent_language import BLOCKS as RECURRENT_BLOCKS
from memfit.models.recurrent_language import RecurrentLanguageModel
from memfit.step import Batch
from memfit.workloads import generate as generate_code
from memfit.workloads.base import Arrays, ExportSpec, Role, variant_builders
from memfit.workloads.generate import Logits, NextLogits, Sampling, generate
from memfit.workloads.ngrams import NGrams, num_counted

NUM_TEXTS, PROMPT_TOKENS, TEXT_TOKENS = 3, 16, 60
"""How many test documents a finished model continues for the report, from how many tokens, by how many."""
SAMPLINGS = {"greedy": Sampling(temperature=0), "temperature 0.8, top-p 0.95": Sampling(top_p=0.95)}
MAX_WIDENED_BYTES = 2**31 - 2**28
"""Most bytes of a backbone in fp32 that leave room for the rest in one ONNX file of 2 GiB."""


@dataclass(frozen=True, kw_only=True)
class LanguageLoss:
    """Cross-entropy of the next token. Raises ConfigError for a value that cannot work."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over all tokens, while training (Szegedy et al., 2016)."""
    balance_weight: float = 0.01
    """experts: weight of the loss that evens out how much each expert is used within a sample."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1", self.label_smoothing)
        require(self.balance_weight >= 0, "balance_weight", "0 or more", self.balance_weight)


class LanguageWorkload:
    """A prepared corpus and the models of `models.recurrent_language`, `decoder_language` and `experts_language`.

    A sample is `seq_len` tokens; its padding counts nothing, so that gradients do not depend on how a batch is cut.
    """

    blocks = (*RECURRENT_BLOCKS, *DECODER_BLOCKS)

    def __init__(self, data_dir: Path, model: Mapping[str, Any], loss: Mapping[str, Any]) -> None:
        self.model = dict(model)
        own = self.model["variants"][self.model["variant"]]
        self.corpus = PreparedCorpus(data_dir)
        self.samples = TokenSamples(self.corpus, own["seq_len"], own["packing"])
        self.settings = build(LanguageLoss, loss, "loss.")
        self.with_experts = own["name"] == "experts"

    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return model builders by name, the wanted one first."""
        return variant_builders(self.model, self._build)

    def _build(self, options: Mapping[str, Any]) -> LanguageModel:
        return build_language_model(options, self.corpus.vocab_size)

    def num_samples(self, split: str) -> int:
        """Count the samples of a split."""
        return self.samples.num_samples(split)

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """Cut tokens and the targets that follow them, int64 [n, seq_len]; targets of padding are -100."""
        tokens, targets = self.samples.cut(split, indices)
        return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the sum over tokens of the cross-entropy, in nats; of experts, over samples, that of their balance."""
        assert isinstance(model, LanguageModel)
        terms = {}
        if isinstance(model, ExpertsLanguageModel):
            hidden, balance = model.hidden_and_balance(batch["tokens"], batch["targets"] != IGNORED)
            terms["balance"] = self.settings.balance_weight * balance.sum()
        else:
            hidden = model.hidden(batch["tokens"])
        smoothing = self.settings.label_smoothing if model.training else 0.0
        entropy = linear_cross_entropy(hidden, model.head, batch["targets"], label_smoothing=smoothing)
        return {"token": entropy, **terms}

    def count(self, batch: Batch) -> Mapping[str, float]:
        """Count the tokens that are predicted, and samples for the balance."""
        samples = {"balance": float(len(batch["targets"]))} if self.with_experts else {}
        return {"token": float((batch["targets"] != IGNORED).sum()), **samples}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return per sample the sum of its tokens' negative log-likelihoods, and how many were the likeliest, [n]."""
        assert isinstance(model, LanguageModel)
        hidden = model.hidden(batch["tokens"]).flatten(0, 1)
        targets = batch["targets"].flatten()
        parts = [
            _token_scores(model.logits(hidden[rows]), targets[rows])
            for rows in _slices(len(targets), chunk_rows(self.corpus.vocab_size))
        ]
        nll, correct = (torch.cat(part).view(batch["targets"].shape).sum(dim=1) for part in zip(*parts, strict=True))
        return {"nll_sum": nll, "num_correct": correct}

    def truth(self, split: str, indices: np.ndarray) -> Arrays:
        """Return per sample the position of its first input, its predicted tokens and the bytes they stand for, [n]."""
        first, lengths = self.samples.spans(split, np.asarray(indices))
        tokens = self.corpus.tokens(split)
        sizes = [
            int(self.corpus.token_bytes[tokens[start + 1 : start + 1 + length]].sum(dtype=np.int64))
            for start, length in zip(first.tolist(), lengths.tolist(), strict=True)
        ]
        num_bytes = np.array(sizes, np.int64)
        if not self.corpus.manifest["byte_exact"]:  # a tokenizer that changes text: in proportion
            told = self.corpus.token_bytes[tokens].sum(dtype=np.int64)
            num_bytes = (num_bytes * (self.corpus.manifest["num_bytes"][split] / told)).round().astype(np.int64)
        return {"first_token": first, "num_tokens": lengths, "num_bytes": num_bytes}

    def score(self, truth: Arrays, predictions: Arrays) -> dict[str, float | None]:
        """Score the predictions; see metrics.language."""
        return language_scores(
            predictions["nll_sum"], truth["num_tokens"], truth["num_bytes"], predictions.get("num_correct")
        )

    def baselines(self, split: str) -> dict[str, Arrays]:
        """Predict by how often a token occurs in train, and by how often it follows the one before it."""
        validation, scored = self.corpus.tokens("validation"), self.corpus.tokens(split)
        counts = NGrams(self.corpus.tokens("train"), [validation, scored], self.corpus.vocab_size)
        strength = counts.best_strength(validation)
        found = {"unigram": counts.unigram_nll(scored), "bigram": counts.bigram_nll(scored, strength)}
        first, lengths = self.samples.spans(split, np.arange(self.num_samples(split)))
        totals = {name: np.concatenate([[0.0], np.cumsum(nll)]) for name, nll in found.items()}
        return {name: {"nll_sum": total[first + lengths] - total[first]} for name, total in totals.items()}

    def inference_module(self, model: nn.Module) -> nn.Module:
        """Wrap a model for consumers: tokens (and a state) in, the next token's logits out."""
        assert isinstance(model, LanguageModel)
        plain = merged(model)
        if isinstance(plain, ExpertsLanguageModel):
            _widen(plain.get_submodule("backbone"))
        return StreamingInference(plain) if isinstance(plain, RecurrentLanguageModel) else LanguageInference(plain)

    def export(self, samples: int) -> ExportSpec:
        """Describe the ONNX graph's inputs and outputs, with evenly spaced test samples."""
        size = self.num_samples("test")
        whole = np.flatnonzero(self.samples.spans("test", np.arange(size))[1] == self.samples.seq_len)
        usable = whole if len(whole) >= samples else np.arange(size)
        chosen = usable[np.linspace(0, len(usable) - 1, samples).round().astype(np.int64)]
        inputs = [_entry("tokens", ["batch", "time"], "int64", "Tokens of tokenizer.json; a document begins with eot.")]
        outputs: list[dict[str, Any]] = [
            _entry(
                "logits", ["batch", self.corpus.vocab_size], "float32", "Of the token after the last; not normalized."
            ),
            _entry(
                "log_likelihood", ["batch", "time"], "float32", "Of each token given those before it here; 0 first."
            ),
        ]
        arrays = {"tokens": self.samples.cut("test", chosen)[0]}
        shape = self._state_shape()
        if shape:
            state: list[int | str] = ["batch", *shape]
            inputs.append(_entry("state", state, "float32", "next_state of the tokens before these; zeros at first."))
            outputs.append(_entry("next_state", state, "float32", "What the next call takes as its state."))
            arrays["state"] = np.random.default_rng(0).normal(0, 0.5, (len(chosen), *shape)).astype(np.float32)
        return ExportSpec(
            inputs=inputs,
            outputs=outputs,
            sample_inputs=arrays,
            card={"language": self._card(shape)},
            support_files={"tokenizer.json": self.corpus.tokenizer_path, "generate.py": Path(generate_code.__file__)},
            requirements=(f"tokenizers=={version('tokenizers')}",),
        )

    def _state_shape(self) -> list[int]:
        own = self.model["variants"][self.model["variant"]]
        settings = LanguageSettings.from_dict({**own, "vocab_size": self.corpus.vocab_size})
        return [settings.num_layers, settings.state_channels] if settings.name == "recurrent" else []

    def _card(self, state_shape: list[int]) -> dict[str, Any]:
        facts = {"vocab_size": self.corpus.vocab_size, "eot": self.corpus.eot, "seq_len": self.samples.seq_len}
        return {**facts, "state_shape": state_shape, "tokenizer_sha256": self.corpus.manifest["tokenizer_sha256"]}

    def describe(self) -> dict[str, Any]:
        """Return the corpus' size, how it was cut, and what the baselines were fitted on."""
        num_train = len(self.corpus.tokens("train"))
        keys = ("vocab_size", "num_documents", "num_tokens", "num_bytes", "duplicates")
        return {
            "headline": "bits_per_byte",
            **{key: self.corpus.manifest[key] for key in keys},
            "seq_len": self.samples.seq_len,
            "num_samples": {split: self.num_samples(split) for split in SPLITS},
            "baselines_fitted_on": f"{num_counted(num_train)} of {num_train} train tokens",
        }

    def illustrate(self, model: nn.Module) -> dict[str, Any]:
        """Continue the beginnings of some test documents; of experts, say how much each is used."""
        assert isinstance(model, LanguageModel)
        with torch.no_grad():
            found: dict[str, Any] = {"texts": list(self._texts(merged(model).eval()))}
            if isinstance(model, ExpertsLanguageModel):
                found["expert_loads"] = self._expert_loads(model)
        return found

    def _texts(self, model: LanguageModel) -> Iterator[dict[str, str]]:
        tokenizer = self.corpus.tokenizer()
        starts, tokens = self.corpus.documents("test"), self.corpus.tokens("test")
        chosen = np.linspace(0, len(starts) - 2, min(NUM_TEXTS, len(starts) - 1)).round().astype(np.int64)
        for start, stop in zip(starts[chosen].tolist(), starts[chosen + 1].tolist(), strict=True):
            prompt = tokens[start : min(start + 1 + PROMPT_TOKENS, stop)].tolist()
            for how, sampling in SAMPLINGS.items():
                step = next_logits(model, self.samples.seq_len)
                text = list(generate(step, prompt, sampling, TEXT_TOKENS, self.corpus.eot))
                yield {"prompt": tokenizer.decode(prompt[1:]), "how": how, "text": tokenizer.decode(text)}

    def _expert_loads(self, model: ExpertsLanguageModel) -> list[float]:
        batch = self.batch("test", np.arange(min(self.num_samples("test"), 64)))
        device = next(model.parameters()).device
        return model.expert_loads(batch["tokens"].to(device), (batch["targets"] != IGNORED).to(device)).tolist()

    def carry(
        self, tensors: Mapping[str, Tensor], before: Mapping[str, Any], model: nn.Module, role: Role
    ) -> dict[str, Tensor]:
        """Carry tensors of a model with the settings `before` over to another; see models.growth."""
        assert isinstance(model, LanguageModel)
        if isinstance(model, ExpertsLanguageModel) and before["name"] != "experts":
            return become_backbone(tensors, model, role)
        return grow(tensors, model, role)


def build_language_model(options: Mapping[str, Any], vocab_size: int) -> LanguageModel:
    """Build a model from a config's settings."""
    settings = LanguageSettings.from_dict({**options, "vocab_size": vocab_size})
    model: LanguageModel
    if settings.name == "experts":
        model = ExpertsLanguageModel(settings, _backbone(options, vocab_size))
    else:
        model = (RecurrentLanguageModel if settings.name == "recurrent" else DecoderLanguageModel)(settings)
    if settings.lora_rank:
        add_low_rank(model, rank=settings.lora_rank, alpha=settings.lora_alpha, targets=settings.lora_targets)
    return model


def _backbone(options: Mapping[str, Any], vocab_size: int) -> Backbone:
    backbone, precision = options["backbone"], options["backbone_precision"]
    if isinstance(backbone, str):
        from memfit.workloads.backbone import load_backbone

        return load_backbone(backbone, precision)
    model = build_language_model(backbone, vocab_size)
    return model if precision == "auto" else model.to(getattr(torch, precision))


def _widen(backbone: nn.Module) -> None:
    """Take a half-precision backbone to fp32, or where one ONNX file cannot hold that, to fp16.

    onnxruntime's CPU provider has no products in bf16, and fp16 makes it differ from torch by some thousandths.
    """
    half = [parameter for parameter in backbone.parameters() if parameter.dtype in (torch.float16, torch.bfloat16)]
    fits = 4 * sum(parameter.numel() for parameter in half) < MAX_WIDENED_BYTES
    if half:
        backbone.to(torch.float32 if fits else torch.float16)


def next_logits(model: LanguageModel, seq_len: int) -> NextLogits:
    """Return what predicts the next token: a recurrent model streams, others read the last `seq_len` tokens again."""
    device = next(model.parameters()).device
    state = model.initial_state(1) if isinstance(model, RecurrentLanguageModel) else torch.empty(0)
    seen: list[int] = []

    def following(new: Sequence[int]) -> Logits:
        nonlocal state
        if isinstance(model, RecurrentLanguageModel):
            hidden, state = model.stream(torch.tensor([list(new)], device=device), state)
        else:
            seen.extend(new)
            hidden = model.hidden(torch.tensor([seen[-seq_len:]], device=device))
        found: Logits = model.logits(hidden[0, -1]).cpu().numpy()
        return found

    return following


class LanguageInference(nn.Module):
    """A model as a consumer calls it: tokens in; the next token's logits and each token's log-likelihood out."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Map tokens int64 [n, T] to logits float32 [n, V] and log-likelihoods float32 [n, T]."""
        return _read_off(self.model.logits(self.model.hidden(tokens)), tokens)


class StreamingInference(nn.Module):
    """A recurrent model as a consumer calls it: it takes a state with the tokens, and gives the one that follows."""

    def __init__(self, model: RecurrentLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        """Map tokens int64 [n, T] and a state [n, layers, C] to logits [n, V], log-likelihoods [n, T], a state."""
        hidden, following = self.model.stream(tokens, state)
        return (*_read_off(self.model.logits(hidden), tokens), following)


def _read_off(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    chosen = logits.log_softmax(dim=-1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    return logits[:, -1], F.pad(chosen, (1, 0))


def _token_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    return nll, logits.argmax(dim=-1) == targets


def _slices(size: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, size, rows))


def _entry(name: str, shape: list[int | str], dtype: str, description: str) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": dtype, "unit": "", "description": description}
