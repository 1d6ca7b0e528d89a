"""A pretrained language model that others read: a local folder of Hugging Face's, loaded once and as it is stored."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.errors import ConfigError
from memfit.process import is_out_of_memory
from memfit.recovery import release_memory

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
AS_STORED = "auto"
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""What safetensors calls them."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CLOSE = 0.02
"""Part of the largest logit by which half precision may differ between two ways to the same product."""


class HuggingFaceBackbone(nn.Module):
    """A causal language model as hidden rows and the matrix that makes logits of them."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.body: nn.Module = causal.base_model
        head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
        # a tied matrix is registered once, as the embedding: files of tensors refuse one that has two names
        self.lm_head: nn.Module | None = None if head.weight is embedding.weight else head

    @property
    def head(self) -> Tensor:
        """The matrix [V, H] whose product with a hidden row is the logits of the next token."""
        body: Any = self.body
        layer: Any = body.get_input_embeddings() if self.lm_head is None else self.lm_head
        weight: Tensor = layer.weight
        return weight

    @property
    def width(self) -> int:
        """Channels H of a hidden row."""
        return self.head.shape[1]

    @property
    def vocab_size(self) -> int:
        """Tokens that the head knows: at least those of the tokenizer, as vocabularies are often rounded up."""
        return self.head.shape[0]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to normalized hidden rows [n, T, H]; row t has seen tokens 0 .. t."""
        rows: Tensor = self.body(input_ids=tokens, use_cache=False, return_dict=True).last_hidden_state
        return rows


def load_backbone(folder: str | Path, dtype: str = AS_STORED) -> HuggingFaceBackbone:
    """Load the causal language model in a folder, in evaluation mode, on the CPU.

    dtype: of the weights: float16, bfloat16, float32, or "auto" for what config.json names. Weights that are stored in
    it stay in their file, which is mapped into memory: pages are read when they are needed. Others are read and
    converted one after the other. Under `torch.device("meta")` the model is built without weights. No network, no code
    from the folder, no pickled weights.
    Raises: ConfigError for a folder that is not one of an unquantized causal language model with weights in
    safetensors, and for a model whose logits are not the product of its hidden rows and its head.
    """
    if dtype not in (AS_STORED, *DTYPES):
        raise ConfigError(f"backbone dtype: expected {AS_STORED}, {', '.join(DTYPES)}, got {dtype!r}.")
    path = Path(folder)
    config = _config(path)
    model_class = _causal_class(path, config)
    if torch.empty(0).is_meta:
        causal = model_class._from_config(config, dtype=DTYPES.get(dtype) or config.dtype or torch.float32)
        causal.tie_weights()  # left out on `meta` by some versions
        return _wrapped(path, causal)
    causal = _read(path, model_class, config, DTYPES.get(dtype) or config.dtype)
    backbone = _wrapped(path, causal)
    _check_computes(path, causal, backbone)
    release_memory("cpu")  # a tenth of the weights, where they were converted one by one
    return backbone


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("a pretrained backbone needs transformers. pip install 'memfit[huggingface]'.") from error
    return transformers


def _config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        there = "a folder without one" if path.is_dir() else "no folder"
        raise ConfigError(
            f"backbone: expected a folder with config.json, got {there}: {str(path)!r}. Download the model beforehand; "
            "names on the hub are not looked up."
        )
    auto = _transformers().AutoConfig
    with _as_config_errors(path, "config.json"):
        config = auto.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"backbone {str(path)!r}: expected a model that is not quantized. Take its half precision one."
        )
    return config


def _causal_class(path: Path, config: Any) -> Any:
    """Find the model's class, among those of transformers itself."""
    transformers = _transformers()
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if known not in (config.architectures or ()):
        raise ConfigError(
            f"backbone {str(path)!r}: expected a causal language model, one that predicts the next token, got "
            f"{', '.join(config.architectures or ()) or 'a config.json without architectures'}."
        )
    return getattr(transformers, known)


def _weight_files(path: Path) -> list[Path]:
    """List the files of the weights: one, or those that the index names."""
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    if (path / _INDEX).is_file():
        with _as_config_errors(path, _INDEX):
            names = sorted(set(json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        odd = [name for name in names if name != Path(name).name or not name.endswith(".safetensors")]
        absent = [name for name in names if name not in odd and not (path / name).is_file()]
        if odd or absent or not names:
            raise ConfigError(f"{path / _INDEX}: expected names of files beside it, got {odd or absent or 'none'}.")
        return [path / name for name in names]
    pickled = sorted(found.name for pattern in _PICKLED for found in path.glob(pattern))
    if pickled:
        raise ConfigError(
            f"backbone {str(path)!r}: expected weights in {_WEIGHTS}, got pickled ones ({', '.join(pickled[:3])}): "
            "reading them could run code. Load them where you trust them and save with save_pretrained()."
        )
    raise ConfigError(f"backbone {str(path)!r}: expected weights in {_WEIGHTS} or {_INDEX}, got neither.")


def _read(path: Path, model_class: Any, config: Any, dtype: torch.dtype | None) -> Any:
    """Build the model around its weights; dtype None: the one that the first of them has."""
    files = _weight_files(path)
    with ExitStack() as opened, _as_config_errors(path, "weights"), _no_progress_bar():
        stored = _stored_dtypes(path, files)
        wanted = dtype or stored[0]
        # Pages of a mapped file would be held beside what is made of them, until all of it is: those are read instead.
        backend = "mmap" if set(stored) == {wanted} else "pread"
        weights: dict[str, Any] = {}
        for file in files:
            reader = opened.enter_context(safe_open(file, framework="pt", device="cpu", backend=backend))
            weights |= {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  (not a mapping)
        causal, report = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=wanted, output_loading_info=True
        )
    if report["missing_keys"] or report["mismatched_keys"] or report["error_msgs"]:
        wrong = [*sorted(map(str, report["missing_keys"])), *map(str, report["mismatched_keys"]), *report["error_msgs"]]
        raise ConfigError(
            f"backbone {str(path)!r}: expected all weights of {model_class.__name__}, without {wrong[:3]}."
        )
    return causal


def _stored_dtypes(path: Path, files: list[Path]) -> list[torch.dtype]:
    """Read from the files' headers in which precisions the weights are."""
    found: dict[str, None] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu", backend="pread") as reader:
            found |= dict.fromkeys(reader.get_slice(name).get_dtype() for name in reader.keys())  # noqa: SIM118
    odd = sorted(set(found) - set(_STORED))
    if odd or not found:
        raise ConfigError(f"backbone {str(path)!r}: expected weights in {', '.join(_STORED)}, got {odd or 'none'}.")
    return [_STORED[name] for name in found]


def _wrapped(path: Path, causal: Any) -> HuggingFaceBackbone:
    head = causal.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        got = "no such matrix" if head is None else "a bias as well"
        raise ConfigError(f"backbone {str(path)!r}: expected logits that are a product with one matrix, got {got}.")
    return HuggingFaceBackbone(causal).eval()


@torch.no_grad()
def _check_computes(path: Path, causal: Any, backbone: HuggingFaceBackbone) -> None:
    """Try on two short texts that part at their end what is taken for granted of hidden rows."""
    tokens = torch.tensor([[0, 1, 2], [0, 1, 3]]) % backbone.vocab_size
    rows = backbone.hidden(tokens)
    logits = causal(input_ids=tokens, use_cache=False).logits.float()
    product = F.linear(rows, backbone.head).float()
    if not product.isfinite().all():
        raise ConfigError(f"backbone {str(path)!r}: expected finite logits in {rows.dtype}, got others. Set bfloat16.")
    if not _close(product, logits):
        raise ConfigError(
            f"backbone {str(path)!r}: expected logits that are the product of hidden rows and head, got others from "
            f"{type(causal).__name__}, which scales or caps them."
        )
    if not _close(rows[0, :2], rows[1, :2]):
        raise ConfigError(f"backbone {str(path)!r}: expected rows that see no later token; these do.")


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= _CLOSE * other.abs().max())


@contextmanager
def _as_config_errors(path: Path, what: str) -> Iterator[None]:
    """Say of which file in which folder the complaints of the readers are."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error!s:.400}"
        raise ConfigError(f"backbone {str(path)!r}: {what} cannot be used ({said}).") from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    logging = _transformers().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
