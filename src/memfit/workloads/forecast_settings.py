"""What a config may say of a forecast, its net and its loss; and how its data are prepared. Torch is not needed."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, Unpack

from pydantic import Field, model_validator

from memfit.data.horizons import MIN_SAMPLES, ForecastSeries
from memfit.data.prepare import outline_series, prepare_series, prepared_fingerprint
from memfit.data.spec import MAX_SPAN, SeriesSpec
from memfit.metrics.forecast import METRICS
from memfit.models.forecaster_settings import MAX_LAYERS, ForecasterSettings
from memfit.parts import ModelPart, Part, PositiveInt, Probability, Width, merge_variants
from memfit.workloads.kind import How, Kind
from memfit.workloads.series_settings import Features, SeriesData

TASK = ("window", "horizon", "season", "inputs")
"""Settings of a model that say what is predicted from what: the same for all of its variants."""


class ForecastFeatures(Features):
    """Features of each row of the history; by default the extra columns as they are, and the time of day and year."""

    lags: tuple[int, ...] | None = ()
    """Past values."""
    difference_lags: tuple[int, ...] | None = ()
    """The newest value minus the one so many rows before."""
    rolling_windows: tuple[int, ...] | None = ()
    """Windows of the rolling statistics and quantiles."""
    calendar: tuple[str, ...] | None = ("hour", "yearday")
    """Of minute, hour, weekday, yearday, weekend, elapsed."""
    streak_window: int | None = 0
    """Longest streak that is counted; 0 for none."""
    share_windows: tuple[int, ...] | None = ()
    """Windows in which the share above the threshold is taken."""
    extra_lags: tuple[int, ...] | None = (1,)
    """Past values of the extra columns; 1 is the row's own."""
    extra_difference_lags: tuple[int, ...] | None = ()
    """Differences of the extra columns."""
    extra_mean_windows: tuple[int, ...] | None = ()
    """Rolling means of the extra columns."""


class ForecastData(SeriesData):
    """One series: its source, columns, clock, gaps, splits and features. It has no classes."""

    features: ForecastFeatures = ForecastFeatures()
    """Features of each row of the history, for `inputs = "features"`."""

    @model_validator(mode="after")
    def _no_classes(self) -> Self:
        if self.class_edges is not None or self.class_quantiles is not None:
            raise ValueError("class_edges, class_quantiles: expected none of them; a forecast has no classes")
        return self

    def spec(self, context: int) -> SeriesSpec:
        """Return what the preparation takes; the one class border it is given is not used."""
        settings = super().spec(context).to_dict()
        return SeriesSpec.from_dict({**settings, "class_edges": [self.threshold], "class_quantiles": None})


class ModelSettings(Part):
    """One recurrent net, and what it predicts from what."""

    horizon: Annotated[int, Field(ge=1, le=1024, strict=True)] = 24
    """Rows that are predicted, all from the rows before the first of them."""
    window: Annotated[int, Field(ge=2, le=MAX_SPAN, strict=True)] = 72
    """Rows of history that the net is trained on; the exported graph takes any number."""
    season: Annotated[int, Field(ge=1, le=MAX_SPAN, strict=True)] = 24
    """Rows after which the series repeats itself, for the seasonal naive baseline."""
    inputs: Literal["value", "features"] = "features"
    """`value`: the series alone. `features`: with data.features of each row, the extra columns among them."""
    cell: Literal["rnn", "lstm", "gru"] = "gru"
    """Which recurrent cell; rnn is Elman's with tanh."""
    hidden: Width = 64
    """Width of each direction of each layer."""
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS, strict=True)] = 1
    """Recurrent layers."""
    bidirectional: bool = False
    """Read the history in both directions; all of it lies in the past."""
    norm: Literal["none", "batch", "layer"] = "none"
    """Of each layer's outputs. Batch statistics are those of a micro-batch; the others make accumulation exact."""
    dropout: Probability = 0.0
    """Dropout of each layer's outputs."""
    head: Literal["direct", "seq2seq"] = "direct"
    """`direct`: all steps at once. `seq2seq`: one after the other, from a decoder."""
    attention: Literal["none", "luong", "bahdanau"] = "none"
    """For seq2seq: multiplicative or additive attention over the history."""
    predict_change: bool = True
    """Predict the change from the last known value, so that an output of 0 is persistence."""
    output: Literal["value", "bins"] = "value"
    """For seq2seq: one number per step, or a distribution over bins; its loss is the cross-entropy."""
    num_bins: Annotated[int, Field(ge=2, le=4096, strict=True)] = 65
    """Bins per step; an odd number has one of no change."""
    bin_range: Annotated[float, Field(gt=0)] = 4.0
    """Where the outermost bins lie, in standard deviations of what is predicted on train rows: of changes or values."""
    beam_width: Annotated[int, Field(ge=1, le=256, strict=True)] = 1
    """For bins: sequences that decoding keeps, so many times as much memory; 1 is greedy."""
    forcing_start: Annotated[float, Field(ge=0, le=1)] = 1.0
    """For seq2seq: share of steps that see the true value before them when training begins."""
    forcing_end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """That share after `forcing_samples`."""
    forcing_samples: PositiveInt = 20_000
    """Training samples over which the share changes, linearly."""

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        self.net()
        return self

    def net(self) -> ForecasterSettings:
        """Return the net's own settings. Raises: ConfigError for what contradicts each other."""
        return ForecasterSettings(**self.model_dump(exclude={"variants", "start", "window", "season", "inputs"}))


class Model(ModelSettings, ModelPart):
    """The net, and the lighter variants that a plan may be allowed to fall back to."""

    def all_variants(self) -> dict[str, dict[str, Any]]:
        """Return every variant's resolved settings, the model's own first, by its cell."""
        own = self.own
        found = merge_variants(self.cell, own, self.variants, ModelSettings)
        for name, settings in found.items():
            if differing := [key for key in TASK if settings[key] != own[key]]:
                raise ValueError(f"variants.{name}: expected the model's own {', '.join(differing)}")
        return found


class Loss(Part):
    """The loss over all steps of the horizon; a stage may change it."""

    loss: Literal["huber", "mse", "mae"] = "huber"
    """Loss of a step's value, in standard deviations of the series; bins take their cross-entropy instead."""
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """Where the Huber loss, and the score of that name, turn linear, in standard deviations of the series."""


class ForecastKind(Kind):
    """Forecasts of several rows, as the pipeline's parent process knows them."""

    data, model, loss = ForecastData, Model, Loss
    monitors = ("total", "value", *METRICS)

    def spec(self, data: ForecastData, model: Model) -> SeriesSpec:
        """Return what the preparation takes: every row of a window has all its features, and a season lies before."""
        lookback = data.spec(1).features.lookback
        return data.spec(max(model.window + lookback - 1, model.season))

    def fingerprint(self, data: ForecastData, model: Model, code_version: str) -> str:
        """Name the prepared data."""
        return str(prepared_fingerprint(self.spec(data, model), code_version))

    def prepare(self, data: ForecastData, model: Model, store: Path, **how: Unpack[How]) -> Path:
        """Prepare the series, or find it prepared. Raises: DataError too where a split is shorter than a horizon."""
        found = prepare_series(self.spec(data, model), store, **how)
        ForecastSeries(found, window=model.window, horizon=model.horizon, season=model.season)
        return found

    def outline(self, data: ForecastData, model: Model, directory: Path) -> bool:
        """Write made-up data of the same shapes."""
        outline_series(self.spec(data, model), directory, min_targets=model.horizon + MIN_SAMPLES - 1)
        return True

    def min_micro_batch_size(self, model: Model) -> int:
        """Return the fewest samples that the batch statistics make sense of."""
        variants = map(ModelSettings.model_validate, model.all_variants().values())
        return max(variant.net().min_micro_batch_size for variant in variants)
