"""The GPU runs that others measured (xMem, Middleware'25), rebuilt as programs whose memory can be estimated.

Needs torchvision and transformers 4.51.3 beside memfit, in an environment of its own. Everything can be built under
`with torch.device("meta")`. What a run did was read off xMem's own training code (repository Stone-ResearchLife/xMem:
perf_estimator/models.py, and train_loop.py and trainer.py of perf_estimator/trainer and exp/trainer).
"""

import csv
import functools
import importlib.util
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

INSTALL = "The measured cases need {}. Install it beside memfit: pip install 'torchvision==0.28.*' transformers==4.51.3"
IMAGE_SIZE, SEQUENCE_LENGTH, LEARNING_RATE, STEPS = 86, 128, 1e-3, 4
PADDED_BATCH = 15  # from here on the longest sequence of a shuffled WikiText-2 batch is 128
ESTIMATORS = {"xmem": "xmem_bytes", "dnnmem": "dnnmem_bytes", "schedtune": "schedtune_bytes", "llmem": "llmem_bytes"}
DEVICES = {"3060": "rtx-3060", "4060": "rtx-4060", "A100-SXM4-40GB": "a100-40"}
CNN_FAMILIES = ("convnext", "resnet", "mobilenet", "mnasnet", "regnet", "vgg", "densenet", "efficientnet")
TEN_CLASSES = ("mobilenetv3", "mnasnet")
_AUTOCAST = torch.autocast
_DECLARED: list[Any] = []  # operators live as long as the library that declared them

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_head": 12}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, "dropout": 0.1, "layerdrop": 0.0}
_T5 = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "dropout_rate": 0.1, "decoder_start_token_id": 0}
_TIED = {"tie_word_embeddings": True}
_ROPE = {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
_ROPE |= {"original_max_position_embeddings": 8192}


def _config(base: dict[str, Any], width: int, inner: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return base | sizes | {"ffn_dim" if base is _OPT else "intermediate_size": inner} | others


def _decoder(kind: str, vocab: int, positions: int, theta: float, *sizes: int, kv: int, **more: Any) -> dict[str, Any]:
    base = {"model_type": kind, "vocab_size": vocab, "max_position_embeddings": positions, "rope_theta": theta}
    return _config(base | {"num_key_value_heads": kv, "rms_norm_eps": 1e-6}, *sizes, **more)


# family and what config.json says beyond transformers' defaults, by the last part of the model's name in lower case
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2 | {"n_layer": 12, "n_positions": 1024}),
    "distilgpt2": ("gpt2", _GPT2 | {"n_layer": 6, "n_positions": 1024}),
    "cerebras-gpt-111m": (
        "gpt2",
        _GPT2 | {"n_layer": 10, "n_positions": 2048, "n_inner": 3072, "activation_function": "gelu"} | _NO_DROPOUT,
    ),
    "gpt-neo-125m": (
        "gpt-neo",
        {"model_type": "gpt_neo", "vocab_size": 50257, "hidden_size": 768, "num_layers": 12, "num_heads": 12}
        | {"attention_types": [[["global", "local"], 6]], "max_position_embeddings": 2048, "window_size": 256}
        | {"activation_function": "gelu_new", "attention_dropout": 0, "embed_dropout": 0, "resid_dropout": 0},
    ),
    "opt-125m": ("opt", _config(_OPT, 768, 3072, 12, 12, word_embed_proj_dim=768)),
    "opt-350m": ("opt", _config(_OPT, 1024, 4096, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False)),
    "t5-small": ("t5", _T5 | {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}),
    "t5-base": ("t5", _T5 | {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "pythia-1b": ("gpt-neox", _config({"model_type": "gpt_neox", "vocab_size": 50304}, 2048, 8192, 16, 8)),
    "deepseek-r1-distill-qwen-1.5b": ("qwen", _decoder("qwen2", 151936, 131072, 1e4, 1536, 8960, 28, 12, kv=2)),
    "qwen3-0.6b": ("qwen", _decoder("qwen3", 151936, 40960, 1e6, 1024, 3072, 28, 16, kv=8, head_dim=128) | _TIED),
    "qwen3-4b": ("qwen", _decoder("qwen3", 151936, 40960, 1e6, 2560, 9728, 36, 32, kv=8, head_dim=128) | _TIED),
    "gemma-2-2b-it": ("gemma", _decoder("gemma2", 256000, 8192, 1e4, 2304, 9216, 26, 8, kv=4, head_dim=256)),
    "llama-3.2-3b-instruct": (
        "llama",
        _decoder("llama", 128256, 131072, 5e5, 3072, 8192, 28, 24, kv=8, head_dim=128, rms_norm_eps=1e-5)
        | {"rope_scaling": _ROPE, **_TIED},
    ),
}


@dataclass(frozen=True)
class Case:
    """One measured run."""

    name: str
    model: str
    family: str
    task: str
    """`cnn` or `llm`."""
    optimizer: str
    batch_size: int
    sequence_length: int
    zero_grad_mode: int
    """When gradients are dropped: 0 as the step starts, 1 between loss and backward, 2 after the update."""
    device: str
    total_bytes: int
    ground_bytes: int
    real_oom: bool
    others: dict[str, float | None]
    """What other estimators said for the same run."""

    def build_model(self) -> nn.Module:
        """Build the model in training mode, randomly initialized, on the default device (`meta` in its context)."""
        return (_language_model if self.task == "llm" else _image_model)(self.model).train()

    def make_batch(self, n: int, seq_len: int | None = None) -> dict[str, Tensor]:
        """Make n samples; sequences are padded as their collator does, so a mask is given and is not all ones."""
        if self.task != "llm":
            return {"inputs": torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE), "labels": torch.zeros(n, dtype=torch.int64)}
        length = seq_len or self.sequence_length or SEQUENCE_LENGTH
        ids, mask = torch.zeros(n, length, dtype=torch.int64), torch.ones(n, length, dtype=torch.int64)
        labels = torch.zeros(n, length, dtype=torch.int64)
        mask[1:, length // 2 :], labels[1:, length // 2 :] = 0, -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(model.parameters(), lr=LEARNING_RATE)

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: dict[str, Tensor] | Callable[[], dict[str, Tensor]],
        kept: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Train one step; return what their loop's variables hold: inputs, outputs, loss, predictions.

        Pass the last step's result as `kept` and hold it nowhere else: it is rebound in the order of their loop, where
        the last outputs (logits, and keys and values of every layer) outlive the next forward but not its backward.
        A batch given as a function is made where their loop moves it to the device.
        """
        kept = {} if kept is None else kept
        kept.pop("inputs", None)
        if self.zero_grad_mode == 0:
            optimizer.zero_grad()
        inputs = kept["inputs"] = batch() if callable(batch) else batch
        if self.task == "llm":
            with mock.patch.object(torch, "autocast", _autocast):
                kept["outputs"] = model(**inputs)
            loss = kept["loss"] = kept["outputs"].loss
        else:
            kept["outputs"] = model(inputs["inputs"])
            loss = kept["loss"] = nn.functional.cross_entropy(kept["outputs"], inputs["labels"])
        if self.zero_grad_mode == 1:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if self.task != "llm":
            kept["predictions"] = torch.max(kept["outputs"], 1)
        if self.zero_grad_mode == 2:
            optimizer.zero_grad()
        return kept


def load_cases(path: str | Path) -> list[Case]:
    """Read the measured runs; nothing is built and nothing but torch is imported."""
    with Path(path).open(newline="") as file:
        return [_case(row) for row in csv.DictReader(file)]


def usable(case: Case) -> bool:
    """Say whether the measured bytes are a truth: the run did not crash, and its sequences had a known length."""
    return not case.real_oom and (case.task != "llm" or case.batch_size >= PADDED_BATCH)


def _case(row: dict[str, str]) -> Case:
    task, mode = row["task"], int(float(row["zero_grad_mode"] or 0))
    length = re.search(r"\d+", row["sequence_length"])
    return Case(
        name=row["case"],
        model=row["model"],
        family=_family(row["model"], task),
        task=task,
        optimizer=row["optimizer"],
        batch_size=int(float(row["batch_size"])),
        sequence_length=int(length[0]) if length else SEQUENCE_LENGTH * (task == "llm"),
        zero_grad_mode=mode if mode in (1, 2) else 0,
        device=next((name for key, name in DEVICES.items() if key in row["gpu_name"]), row["gpu_name"]),
        total_bytes=int(float(row["total_gpu_memory"])),
        ground_bytes=int(float(row["ground_bytes"])),
        real_oom=row["real_oom"].strip().lower() == "true",
        others={name: _estimate(row[column]) for name, column in ESTIMATORS.items()},
    )


def _estimate(text: str) -> float | None:
    return float(text) if text and float(text) >= 0 else None


def _family(model: str, task: str) -> str:
    if task == "llm":
        return LANGUAGE_MODELS.get(_last_part(model), (_last_part(model), {}))[0]
    return next((family for family in CNN_FAMILIES if _squeezed(model).startswith(family)), _squeezed(model))


def _last_part(model: str) -> str:
    return model.rsplit("/", 1)[-1].lower()


def _squeezed(model: str) -> str:
    return re.sub("[^a-z0-9]", "", model.lower()).replace("mobenet", "mobilenet")


def _image_model(model: str) -> nn.Module:
    models, key = _torchvision().models, _squeezed(model)
    names = {_squeezed(name): name for name in models.list_models(module=models)} | {"mnasnet": "mnasnet1_0"}
    if key not in names:
        raise ValueError(f"model: torchvision has none called {model!r}. Name one of torchvision.models.")
    options = {"num_classes": 10} if key.startswith(TEN_CLASSES) else {}
    device = torch.get_default_device()
    with torch.device("cpu" if "regnet" in key else device):  # RegNet's constructor computes its widths with tensors
        return models.get_model(names[key], weights=None, **options).to(device)


def _autocast(device_type: str, *args: Any, **options: Any) -> Any:
    """Stand in for torch.autocast, which rotary embeddings switch off and which knows no `meta`."""
    return nullcontext() if device_type == "meta" else _AUTOCAST(device_type, *args, **options)


def _language_model(model: str) -> nn.Module:
    _torchvision()  # transformers imports it too
    try:
        import transformers
    except ImportError as error:
        raise SystemExit(INSTALL.format("transformers")) from error
    if _last_part(model) not in LANGUAGE_MODELS:
        raise ValueError(f"model: no config for {model!r}. Add its config.json to LANGUAGE_MODELS.")
    config = transformers.AutoConfig.for_model(**LANGUAGE_MODELS[_last_part(model)][1], torch_dtype=torch.float32)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_config(config)


@functools.cache
def _torchvision() -> Any:
    """Import torchvision, first declaring its operators where its compiled part cannot be loaded (a wheel for CUDA)."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit(INSTALL.format("torchvision"))
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except (OSError, ImportError):
        pairs = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms", *pairs, *(f"_{pair}_backward" for pair in pairs)):
            library.define(f"{name}(Tensor x) -> Tensor")
        _DECLARED.append(library)
    import torchvision

    return torchvision
