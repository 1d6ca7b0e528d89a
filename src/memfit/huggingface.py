"""Hugging Face models as training programs: planned from their config, without loading weights."""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.errors import ConfigError
from memfit.memory.simulate import build_on_meta
from memfit.step import Batch, TrainingProgram, tensors_of

TASKS = {
    "Seq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "SequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "ImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
"""The AutoModelFor... classes that are known, and the tables in which transformers lists their models."""
_PER_TOKEN = ("Seq2SeqLM", "CausalLM", "MaskedLM", "TokenClassification")
_IGNORED = -100
"""The label of a position that does not count."""


def program(
    model: Any,
    *,
    task: str | None = None,
    seq_len: int | None = None,
    target_len: int | None = None,
    padded: bool = True,
    dtype: torch.dtype | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    make_batch: Callable[..., Batch] | None = None,
) -> TrainingProgram:
    """Make a training program of a Hugging Face model.

    model: a config, a folder with config.json, or a loaded model; weights are never copied: what is built has random
    ones. task: the name of an AutoModelFor... class, of TASKS; by default that of the model or of the config's
    `architectures`. seq_len: tokens of the longest sample; target_len: of its target (default seq_len).
    padded: whether batches come with an attention mask that hides something; attention then takes kernels that accept
    one. dtype: of the weights; default the loaded model's, or the config's. optimizer: default AdamW, lr 5e-5.
    make_batch: (n, seq_len=None) -> the model's keyword arguments, `labels` among them; default: made up from the
    config, as large as can be.

    The loss is the cross-entropy summed over the labels that are not -100 (of a regression: the square error, summed
    over samples), and `count` is their number over the whole global batch: gradients do not depend on the cut.
    Raises: ConfigError for a model or a task that is not known, or a seq_len that the model has no positions for.
    """
    transformers = _transformers()
    loaded: Any = model if isinstance(model, nn.Module) else None
    config = _config(transformers, model)
    config.use_cache = False
    if getattr(config, "output_router_logits", False):
        raise ConfigError(
            "output_router_logits: expected False, got True: the router's loss compares the tokens of a batch with "
            "each other, so that it would depend on the cut. Switch it off."
        )
    task = _task(transformers, config, loaded, task)
    if make_batch is None:
        make_batch = _Sizes.of(config, task, seq_len, target_len, padded).batch
    make = type(loaded)._from_config if loaded is not None else getattr(transformers, f"AutoModelFor{task}").from_config
    settings: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    frozen: frozenset[str] = frozenset()
    if loaded is not None:
        settings.setdefault("dtype", loaded.dtype)
        frozen = frozenset(name for name, parameter in loaded.named_parameters() if not parameter.requires_grad)
    build = partial(_build, make, config, settings, frozen)
    with torch.random.fork_rng(devices=[]):
        empty = build_on_meta(build)
    if loaded is not None:
        _check_described(loaded, empty)
    problem = getattr(config, "problem_type", None) or ("regression" if _num_labels(config, task) == 1 else None)
    objective = Objective(task, problem)
    return TrainingProgram(
        build_model=build,
        make_batch=make_batch,
        loss=objective.loss,
        count=objective.count,
        optimizer=optimizer or _adamw,
        blocks=_blocks(transformers, empty),
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("memfit.huggingface needs transformers. pip install 'memfit[huggingface]'.") from error
    return transformers


def _config(transformers: Any, model: Any) -> Any:
    """Return a config that may be changed."""
    if isinstance(model, str | Path):
        if not (Path(model) / "config.json").is_file():
            raise ConfigError(
                f"model: expected a folder with config.json, got {str(model)!r}. "
                "For a model on the hub, give AutoConfig.from_pretrained(name)."
            )
        return transformers.AutoConfig.from_pretrained(str(model), local_files_only=True)
    if isinstance(model, transformers.PreTrainedModel):
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ConfigError(
                "model: expected one without gradient checkpointing, as the plan decides on it. Switch it off."
            )
        if getattr(model.config, "quantization_config", None) is not None:
            raise ConfigError("model: expected one that is not quantized. Load it without quantization_config.")
        return copy.deepcopy(model.config)
    if isinstance(model, transformers.PretrainedConfig):
        return copy.deepcopy(model)
    raise ConfigError(
        f"model: expected a transformers config, model, or a folder with config.json, got {type(model).__name__}. "
        "Write a TrainingProgram for anything else."
    )


def _task(transformers: Any, config: Any, loaded: Any, task: str | None) -> str:
    if task is not None:
        if task not in TASKS:
            raise ConfigError(f"task: expected one of {list(TASKS)}, got {task!r}.")
        return task
    names = [type(loaded).__name__] if loaded is not None else list(config.architectures or ())
    tables = transformers.models.auto.modeling_auto
    for known, table in TASKS.items():
        if set(names) & set(getattr(tables, table).values()):
            return known
    raise ConfigError(f"task: expected a model of a known task, got {names or 'a config without architectures'}. "
                      f"Give one of {list(TASKS)}.")  # fmt: skip


def _build(make: Callable[..., Any], config: Any, settings: Mapping[str, Any], frozen: Collection[str]) -> Any:
    model = make(copy.deepcopy(config), **settings)  # which writes to its config
    model.tie_weights()  # left out on `meta` by some versions
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return model


def _check_described(loaded: nn.Module, empty: nn.Module) -> None:
    """Refuse a loaded model that its config does not describe: adapters, other heads, quantized weights."""
    shapes, expected = ({name: p.shape for name, p in each.named_parameters()} for each in (loaded, empty))
    odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if odd:
        raise ConfigError(
            f"model: expected the parameters that its config describes, differing in {len(odd)}: {odd[:3]}. "
            "Write a TrainingProgram whose build_model changes the model as you did."
        )


def _blocks(transformers: Any, model: nn.Module) -> tuple[type[nn.Module], ...]:
    """Find the repeated layers: what transformers checkpoints itself, the innermost where they are nested."""
    layer = transformers.modeling_layers.GradientCheckpointingLayer
    found = {type(module) for module in model.modules() if isinstance(module, layer)}
    if not found:
        names = set(getattr(model, "_no_split_modules", None) or ())
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        found = {type(child) for children in lists for child in children if type(child).__name__ in names}
    around = {
        type(module)
        for module in model.modules()
        if type(module) in found and any(type(child) in found for child in list(module.modules())[1:])
    }
    return tuple(sorted(found - around, key=lambda each: each.__name__))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)


def _num_labels(config: Any, task: str) -> int | None:
    return int(config.num_labels) if task.endswith("Classification") else None


@dataclass(frozen=True)
class _Sizes:
    """What a batch is made of."""

    task: str
    vocab_size: int
    num_labels: int | None
    float_labels: tuple[int, ...] | None
    """Shape of one sample's labels where they are numbers, not classes."""
    pixels: tuple[int, ...] = ()
    """Channels, height and width of an image."""
    seq_len: int = 0
    target_len: int | None = None
    positions: int | None = None
    padded: bool = True

    @classmethod
    def of(cls, config: Any, task: str, seq_len: int | None, target_len: int | None, padded: bool) -> "_Sizes":
        """Read a config."""
        num_labels = _num_labels(config, task)
        problem = getattr(config, "problem_type", None) or ("regression" if num_labels == 1 else None)
        numbers = (num_labels or 1,) if problem in ("regression", "multi_label_classification") else None
        if task == "ImageClassification":
            if seq_len is not None:
                raise ConfigError(f"seq_len: expected None for images, got {seq_len}. Leave it out.")
            size = getattr(config, "image_size", None)
            if size is None:
                raise ConfigError("make_batch: expected one, as the config has no image_size. Give it.")
            height, width = (size, size) if isinstance(size, int) else size
            pixels = (getattr(config, "num_channels", 3), height, width)
            return cls(task, 0, num_labels, numbers, pixels)
        text = config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        if seq_len is None:
            known = f" (the model takes {positions} at most)" if positions else ""
            raise ConfigError(
                f"seq_len: expected the number of tokens of your longest sample, got None. Give it{known}."
            )
        sizes = cls(task, text.vocab_size, num_labels, numbers, (), seq_len, target_len, positions, padded)
        sizes.check(seq_len)
        return sizes

    def check(self, seq_len: int) -> None:
        """Refuse a sequence that the model has no positions for."""
        for name, length in (("seq_len", seq_len), ("target_len", self.target_len or 1)):
            if length < 1 or (self.positions and length > self.positions):
                most = f" to {self.positions}" if self.positions else " or more"
                raise ConfigError(f"{name}: expected 1{most} tokens, got {length}. Change it.")

    def batch(self, n: int, seq_len: int | None = None) -> dict[str, Tensor]:
        """Make n samples, the same every time: input_ids, attention_mask [n, seq_len] or pixel_values, and labels."""
        if self.pixels:
            return {"pixel_values": torch.zeros(n, *self.pixels), "labels": self._classes(n)}
        length = seq_len or self.seq_len
        self.check(length)
        inputs = {"input_ids": _ids(n, length, self.vocab_size)}
        if self.padded:
            mask = inputs["attention_mask"] = torch.ones(n, length, dtype=torch.long)
            mask[:, -1] = 0
        if self.task == "Seq2SeqLM":
            return {**inputs, "labels": _ids(n, self.target_len or length, self.vocab_size)}
        if self.task == "SequenceClassification":
            return {**inputs, "labels": self._classes(n)}
        labels = _ids(n, length, self.num_labels or self.vocab_size)
        if self.padded:
            labels[:, -1] = _IGNORED
        return {**inputs, "labels": labels}

    def _classes(self, n: int) -> Tensor:
        if self.float_labels is not None:
            return torch.zeros(n, *self.float_labels)
        return torch.arange(n) % (self.num_labels or 1)


def _ids(n: int, length: int, limit: int) -> Tensor:
    return (torch.arange(n * length) % limit).view(n, length)


@dataclass(frozen=True)
class Objective:
    """What is minimized: a sum over the labels that count, and how many those are."""

    task: str
    problem: str | None = None
    """The config's problem_type: regression, single_label_classification, multi_label_classification."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sum the loss over a batch {"labels": [n] or [n, length], ...}. Raises: ConfigError without labels."""
        inputs = dict(batch)
        if "labels" not in inputs:
            raise ConfigError(f"make_batch: expected 'labels' among {sorted(inputs)}. Add them; -100 does not count.")
        labels = inputs.pop("labels")
        if self.task == "Seq2SeqLM" and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False
        with _masks_made(inputs):
            logits = model(**inputs).logits
        return {"loss": self._sum(logits.float(), self._counted(labels))}

    def count(self, batch: Batch) -> dict[str, float]:
        """Count the labels of a batch that are not -100."""
        labels = self._counted(batch["labels"])
        return {"loss": float(len(labels) if labels.is_floating_point() else (labels != _IGNORED).sum())}

    def _counted(self, labels: Tensor) -> Tensor:
        """Shift the labels of a causal model: a token predicts its successor."""
        return F.pad(labels, (0, 1), value=_IGNORED)[:, 1:] if self.task == "CausalLM" else labels

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.task in _PER_TOKEN or not (self.problem == "regression" or labels.is_floating_point()):
            logits = logits.reshape(-1, logits.shape[-1])
            return F.cross_entropy(logits, labels.reshape(-1), ignore_index=_IGNORED, reduction="sum")
        wanted = labels.float().reshape(logits.shape)
        criterion = F.mse_loss if self.problem == "regression" else F.binary_cross_entropy_with_logits
        return criterion(logits, wanted, reduction="none").mean(dim=1).sum()


@contextmanager
def _masks_made(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Where a padding mask has no values, as in a simulation, take it for one that hides something.

    Transformers looks whether it hides anything, and leaves the mask out of attention if not.
    """
    if not any(tensor.is_meta for tensor in tensors_of(inputs)):
        yield
        return
    masks = _transformers().masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    plain = masks["sdpa"]

    def made(*args: Any, **settings: Any) -> Any:
        if settings.get("attention_mask") is not None:
            settings |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return plain(*args, **settings)

    masks["sdpa"] = made
    try:
        yield
    finally:
        masks["sdpa"] = plain
