"""RunConfig: what a TOML file may say, with every default; overrides by dotted path."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from memfit.errors import ConfigError
from memfit.memory.devices import PATTERN as DEVICE_PATTERN
from memfit.memory.devices import find_device, is_here, read_devices
from memfit.memory.units import PATTERN as BUDGET_PATTERN
from memfit.metrics.directions import higher_is_better
from memfit.parts import Count, ModelPart, Name, Part, PositiveInt, Probability, Text, cut, explain
from memfit.workloads.kind import Kind
from memfit.workloads.registry import WORKLOADS, is_known, load_kind

MAX_CONFIG_BYTES = 2**20
"""Most bytes of a config; the largest that memfit ships has 2 KiB."""
MAX_OVERRIDE_CHARS = 2**14
"""Most characters of one override."""
MAX_DEPTH = 32
"""Most tables and lists inside one another, and most parts of a dotted key."""
MAX_TABLES = 2**12
"""Most tables: each may have several faults, and all are found before the first is told."""
MIN_SAMPLES = 4
"""Fewest rows that an export's parity is checked on."""
MAX_FAULTS = 20
"""Most faults that one error lists."""
_DEEP_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.){{0,256}}+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}""", re.ASCII
)
"""A dotted key with more parts: the standard library's reader takes quadratic time over it."""
DEFAULT_WORKLOAD = "series"
Precision = Literal["fp32", "bf16", "fp16"]


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
    epoch_steps: PositiveInt | None = None
    """Optimizer steps after which an epoch ends; none: when every sample was used once. The next one draws anew."""
    global_batch_size: Annotated[int, Field(ge=1, le=2**24, strict=True)]
    """Samples per optimizer step, whatever the plan does to fit them."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate."""
    optimizer: Optimizer = Optimizer()
    """The optimizer; every stage starts a new one."""
    schedule: Schedule = Schedule()
    """How the learning rate changes."""
    loss: Part
    """Losses and their weights: the workload's."""
    model: Annotated[dict[Name, Any], Field(max_length=64, default_factory=dict)]
    """Settings of the model that change with this stage, and stay so for the next ones. The weights of the stage before
    are carried over, where the workload knows how: a language model grows without changing what it computes."""
    keep_optimizer: bool | None = None
    """Go on with the optimizer's moments of the stage before; default: where the model changes."""
    train: Annotated[tuple[Text, ...], Field(max_length=256)] = ("*",)
    """Parameters to train, by shell-style patterns of their names; the rest is frozen, and what the model itself keeps
    frozen, such as the backbone of experts, is so in any case."""
    monitor: Text = "total"
    """Validation figure that decides which weights are best: a loss term, `total`, or a metric such as `mae`."""
    monitor_mode: Literal["min", "max"] | None = None
    """Which way the monitored value is better; default: by its name."""
    patience: Count = 15
    """Epochs without a better monitored value before the stage ends; 0 trains all epochs."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest total gradient norm; 0 clips nothing."""
    skip_spikes: Annotated[float, Field(ge=0)] = 0.0
    """Skip, and record, an update whose gradient norm is more than so many times the median of the last 50, at most
    three in a row; 0 skips none."""
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
        plain = self.model_dump(mode="json", exclude={"optimizer", "lr", "loss", "model"})
        mode = self.monitor_mode or ("max" if higher_is_better(self.monitor) else "min")
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
    samples: Annotated[int, Field(ge=MIN_SAMPLES, le=4096, strict=True)] = 64
    """Real test rows that parity is checked on and that the bundle carries."""
    with_weights: bool = True
    """Add the trained weights, weights.safetensors, which another training may start from."""


class Gate(Part):
    """What a finished model must reach on the test rows; one that does not is finished all the same, and says so."""

    metric: Text = ""
    """The score that decides; none: the workload's own choice."""
    beat_baselines: bool = True
    """Be better than every baseline, by more than chance explains: a 95 % bootstrap interval of the difference."""
    at_least: float | None = None
    """Smallest score."""
    at_most: float | None = None
    """Largest score."""


class RunConfig(Part):
    """One run: data, model, stages, and how they may fit into memory."""

    name: Name
    """Name of the run; its directories are runs/<name>/<run id>."""
    workload: str
    """Kind of problem."""
    seed: Count = 0
    """Seed of everything random."""
    data: Part
    """What is learned from: the workload's."""
    model: ModelPart
    """What learns: the workload's."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=64)]
    """How it is trained, in order."""
    plan: Planning = Planning()
    """How it may fit into memory."""
    gate: Gate = Gate()
    """What the model must reach on the test rows."""
    export: Export = Export()
    """The ONNX bundle."""
    hang_minutes: Annotated[float, Field(ge=0)] = 30.0
    """A training child that says nothing for so long is ended, and goes on from its checkpoint; 0 waits for ever."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: expected each name once, got {names}")
        monitors = self.kind.monitors
        for index, stage in enumerate(self.stages):
            if monitors is not None and stage.monitor not in monitors:
                raise ValueError(
                    f"stages.{index}.monitor: expected one of {', '.join(monitors)}, got {stage.monitor!r}"
                )
        self._check_models()
        known = self.model.all_variants()
        if missing := [name for name in self.plan.variants if name not in known]:
            raise ValueError(f"plan.variants: {missing} are not among the model's variants {list(known)}")
        return self

    def _check_models(self) -> None:
        """Refuse changes of the model that a stage cannot make. Raises: ValueError."""
        first, *later = self.stages
        if first.model:
            raise ValueError("stages.0.model: expected none; set what the first stage trains in the table model")
        if any(stage.model for stage in later) and (self.model.variants or self.plan.variants):
            raise ValueError("stages: expected no variants where a stage changes the model")
        if first.keep_optimizer:
            raise ValueError("stages.0.keep_optimizer: expected a stage before it, whose optimizer is kept")
        self.stage_models()

    def stage_models(self) -> list[ModelPart]:
        """Return the model of each stage: that of the stage before, with what the stage changes. Raises: ValueError."""
        found = [self.model]
        for index, stage in enumerate(self.stages[1:], 1):
            try:
                found.append(self.kind.follow(found[-1], stage.model) if stage.model else found[-1])
            except ValidationError as error:
                faults = [explain(dict(fault), type(self.model)) for fault in error.errors()]
                raise ValueError(f"stages.{index}.model: {'; '.join(faults)}") from None
            except ValueError as error:
                raise ValueError(f"stages.{index}.model: {error}") from None
        return found

    @property
    def kind(self) -> Kind:
        """Return what is known of the workload."""
        return load_kind(self.workload)


@cache
def config_class(workload: str) -> type[RunConfig]:
    """Return the config of a workload: RunConfig with the workload's own tables."""
    kind = load_kind(workload)

    stage = create_model(
        "Stage", __base__=Stage, __doc__=Stage.__doc__, loss=_own(Stage, "loss", kind.loss, kind.loss())
    )
    stages = Annotated[tuple[stage, ...], Field(min_length=1, max_length=64)]  # type: ignore[valid-type]
    return create_model(
        "RunConfig",
        __base__=RunConfig,
        __doc__=RunConfig.__doc__,
        workload=_own(RunConfig, "workload", Literal[workload], workload),
        data=_own(RunConfig, "data", kind.data, ... if _needs_values(kind.data) else kind.data()),
        model=_own(RunConfig, "model", kind.model, kind.model()),
        stages=_own(RunConfig, "stages", stages),
    )


def _needs_values(part: type[Part]) -> bool:
    return any(field.is_required() for field in part.model_fields.values())


def _own(part: type[Part], name: str, kind: Any, default: Any = ...) -> Any:
    """Describe a field that a workload has a type of its own for."""
    return kind, Field(default, description=part.model_fields[name].description)


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
        raise ConfigError(f"{path}: not TOML: {cut(str(error))}.") from error
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


def validate(document: Mapping[str, Any], where: str) -> RunConfig:
    """Turn a document into the RunConfig of its workload. Raises: ConfigError that lists every fault."""
    workload = document.get("workload", DEFAULT_WORKLOAD)
    if not isinstance(workload, str) or not is_known(workload):
        near = difflib.get_close_matches(str(workload)[:64], WORKLOADS, n=1, cutoff=0.0)
        raise ConfigError(
            f"{where}: workload: expected one of {', '.join(WORKLOADS)}, or your own as package.module:function, got "
            f"{workload!r:.80}; the nearest one is {near[0]}."
        )
    wanted = config_class(workload)
    try:
        return wanted.model_validate(document)
    except ValidationError as error:
        count = error.error_count()
        faults = [f"  {explain(dict(fault), wanted)}" for fault in error.errors(include_url=False)[:MAX_FAULTS]]
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


def to_toml(config: RunConfig) -> str:
    """Write a config with every default; reading it back gives the same config."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
