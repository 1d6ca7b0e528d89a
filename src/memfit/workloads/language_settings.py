"""What a config may say of a corpus, a language model and its loss; how such data are prepared. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Unpack

from pydantic import Field, model_validator

from memfit.data.corpus import corpus_fingerprint, outline_corpus, prepare_corpus
from memfit.data.corpus_spec import CorpusSpec
from memfit.errors import ConfigError, DataError
from memfit.files import fingerprint, sha256_file
from memfit.metrics.language import METRICS
from memfit.models.language_settings import LanguageSettings, check_carried
from memfit.parts import Count, Depth, ModelPart, Part, PositiveInt, Probability, Share, Text, Width, merge_variants
from memfit.starting_point import starting_point
from memfit.workloads.kind import How, Kind

MAX_SEQ_LEN = 1 << 20
OUTLINE_TOKENS = 1 << 18
"""Made-up tokens of an outline; a longer seq_len takes as many more."""
PATH = Annotated[str, Field(max_length=4096)]


class Source(Part):
    """Where documents come from."""

    kind: Literal["files", "sample"] = "files"
    """`files`: text, JSON lines or Parquet. `sample`: a packaged one."""
    paths: Annotated[tuple[PATH, ...], Field(max_length=4096)] = ()
    """For `files`: paths or globs, read in the order of their names."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """For `files`; `auto`: by suffix, .gz and .zst too."""
    field: Text = "text"
    """The key of a JSON line, or the Parquet column, that holds a document's text."""
    separator: Text = ""
    """For text files: what stands between documents, such as "\\n\\n"; none: a file is a document."""
    name: Literal["pydoc_topics"] = "pydoc_topics"
    """For `sample`: which one. pydoc_topics: 79 pages of Python's own language reference."""


class TokenizerData(Part):
    """Byte-level byte-pair encoding (Sennrich et al., 2016): every text can be encoded, and nothing is lost."""

    vocab_size: Annotated[int, Field(ge=257, le=2**20, strict=True)] = 5700
    """Tokens of a trained one: bytes, frequent sequences of them, and the end of a text."""
    path: PATH = ""
    """A tokenizer.json, or a folder that holds one, to take as it is; none: that of the model that is started from, or
    one that is trained on the train documents."""
    train_bytes: PositiveInt = 1 << 26
    """Most bytes of train documents that the training of a tokenizer reads."""


class CorpusData(Part):
    """Documents, their splits and their tokens."""

    source: Source
    """Where they come from."""
    tokenizer: TokenizerData = TokenizerData()
    """How text becomes tokens."""
    end_of_text: Text = "<|endoftext|>"
    """The token that stands between documents; a tokenizer that is given must have it."""
    min_chars: PositiveInt = 1
    """Documents with fewer characters, blanks around them not counted, are left out."""
    max_documents: PositiveInt | None = None
    """Read no more documents than this; none: all."""
    validation_share: Share = 0.05
    """Share of the documents that is validated on."""
    test_share: Share = 0.05
    """Share of the documents that is tested on."""
    near_duplicates: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of a document's eight-word sequences that, found in held-out documents, makes it a copy, which is left out;
    0: only whole copies are."""
    seed: int = 0
    """Which documents the splits take."""

    @model_validator(mode="after")
    def _can_be_prepared(self) -> Self:
        self.spec()
        return self

    def spec(self, tokenizer: str = "") -> CorpusSpec:
        """Return what the preparation takes, `tokenizer` where no other is named. Raises: ConfigError."""
        document = self.model_dump(mode="json", exclude_none=True)
        document["tokenizer"]["path"] = self.tokenizer.path or tokenizer
        return CorpusSpec.from_dict(document)


class ModelSettings(Part):
    """One language model."""

    name: Literal["recurrent", "decoder", "experts"] = "recurrent"
    """`recurrent`: gated linear recurrences, computed by an associative scan. `decoder`: causal attention. `experts`: a
    decoder whose experts read one frozen backbone."""
    seq_len: Annotated[int, Field(ge=2, le=MAX_SEQ_LEN, strict=True)] = 128
    """Tokens of a sample."""
    packing: Literal["stream", "document"] = "stream"
    """`stream`: documents one after the other. `document`: no sample holds two documents; the rest is padding."""
    d_model: Width = 128
    """Width of the residual stream."""
    num_layers: Depth = 4
    """Blocks."""
    num_heads: Annotated[int, Field(ge=1, le=1024, strict=True)] = 4
    """decoder, experts: attention heads."""
    state_width: Width | None = None
    """recurrent: channels of each block's state; none: 2 d_model."""
    ff_width: Width | None = None
    """Inner width of the feed-forward layers; none: 8/3 d_model, rounded up."""
    dropout: Probability = 0.0
    """Dropout of what each block adds to the stream, and of the embedding."""
    backbone: PATH | dict[str, Any] = ""
    """experts: a local Hugging Face folder; none in a stage's model: that of the stage before."""
    backbone_precision: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """experts: what the backbone is kept and computed in; auto: as it is stored."""
    num_experts: Annotated[int, Field(ge=1, le=4096, strict=True)] = 1
    """experts: how many share the backbone."""
    experts_per_token: PositiveInt | None = None
    """experts: how many the router mixes for a token; none: all."""
    expert_rank: Width = 16
    """experts: width of each expert's adapter."""
    lora_rank: Count = 0
    """Rank of the low-rank changes to the layers that `lora_targets` names (LoRA, Hu et al., 2021); 0 for none. Train
    them alone with a stage's `train = ["*lora_*"]`."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """What the low-rank changes are multiplied with, times 1 / lora_rank."""
    lora_targets: Annotated[tuple[Text, ...], Field(min_length=1, max_length=256)] = ("*",)
    """Shell-style patterns of the names of linear layers."""

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        self.net()
        if (self.name == "experts") != bool(self.backbone):
            expected = "a Hugging Face folder, or a stage before it" if self.name == "experts" else "none"
            raise ValueError(f"backbone: expected {expected}, with name {self.name!r}; got {self.backbone!r:.80}")
        return self

    def net(self) -> LanguageSettings:
        """Return the net's own settings, all but its vocabulary. Raises: ConfigError for a value that cannot work."""
        return LanguageSettings.from_dict({**self.model_dump(), "vocab_size": 1})


class Model(ModelSettings, ModelPart):
    """The model, and the lighter variants that a plan may be allowed to fall back to."""

    def all_variants(self) -> dict[str, dict[str, Any]]:
        """Return every variant's resolved settings, the model's own first, by its name."""
        found = merge_variants(self.name, self.own, self.variants, ModelSettings)
        for name, settings in found.items():
            if differing := [key for key in ("seq_len", "packing") if settings[key] != self.own[key]]:
                raise ValueError(f"variants.{name}: expected the model's own {', '.join(differing)}")
        return found


class Loss(Part):
    """Cross-entropy of the next token."""

    label_smoothing: Probability = 0.0
    """Share of the target spread evenly over all tokens, while training."""
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    """experts: weight of the loss that evens out how much each expert is used within a sample."""


class LanguageKind(Kind):
    """The language workload, as the pipeline's parent process knows it."""

    data, model, loss = CorpusData, Model, Loss
    monitors = ("total", "token", *METRICS)

    def spec(self, data: CorpusData, model: Model) -> CorpusSpec:
        """Return what the preparation takes. Raises: ConfigError where the model to start from has no tokenizer."""
        if isinstance(model.backbone, str) and model.backbone:
            return data.spec(model.backbone)
        return data.spec(_tokenizer_of(model.start) if model.start and not data.tokenizer.path else "")

    def fingerprint(self, data: CorpusData, model: Model, code_version: str) -> str:
        """Name the prepared data."""
        return corpus_fingerprint(self.spec(data, model), code_version)

    def prepare(self, data: CorpusData, model: Model, store: Path, **how: Unpack[How]) -> Path:
        """Prepare the tokens, or find them prepared."""
        return prepare_corpus(self.spec(data, model), store, **how)

    def outline(self, data: CorpusData, model: Model, directory: Path) -> bool:
        """Write made-up tokens of the same vocabulary."""
        outline_corpus(self.spec(data, model), directory, min_tokens=max(OUTLINE_TOKENS, 8 * model.seq_len))
        return True

    def follow(self, before: Model, changes: Mapping[str, Any]) -> Model:
        """Return a model that is wider or deeper, has low-rank changes, or whose experts read the one before."""
        own = {**before.own, **changes}
        if own["name"] == "experts" != before.name and "backbone" not in changes:
            own["backbone"] = before.own
        after = Model.model_validate(own)
        check_carried(before.net(), after.net())
        return after

    def sources_fingerprint(self, model: Model) -> str:
        """Name the files of a backbone. Raises: DataError where they are not there."""
        if not isinstance(model.backbone, str) or not model.backbone:
            return ""
        files = [path for path in sorted(Path(model.backbone).glob("*")) if path.suffix in (".json", ".safetensors")]
        if not files:
            raise DataError(f"model.backbone: expected a Hugging Face folder, got {model.backbone!r}, which holds none")
        return fingerprint({path.name: sha256_file(path) for path in files})


def _tokenizer_of(start: str) -> str:
    found = starting_point(start).tokenizer
    if found is None:
        raise ConfigError(
            f"model.start: {start} has no tokenizer.json. Name the one that it was trained with in data.tokenizer.path."
        )
    return str(found)
