import json

import pytest

from memfit.data.features import feature_names
from memfit.data.spec import FeatureSpec, SeriesSpec
from memfit.errors import ConfigError

LEAST = {"source": {"kind": "files", "paths": ["a.csv"]}, "time_column": "t", "value_column": "v"}


def test_survives_a_round_trip_through_json():
    spec = SeriesSpec.from_dict(
        {**LEAST, "extra_columns": ["a"], "class_edges": [1, 2.5], "gaps": {"policy": "interpolate"}}
    )
    document = json.loads(json.dumps(spec.to_dict()))
    assert SeriesSpec.from_dict(document) == spec
    assert document["class_edges"] == [1.0, 2.5]


def test_the_default_features_are_121_and_8_for_each_extra_column():
    spec = FeatureSpec()
    names = feature_names(spec.to_dict(), [])
    assert len(names) == len(set(names)) == 121
    assert len(feature_names(spec.to_dict(), ["a", "b"])) == 121 + 16
    assert spec.lookback == 169


def test_the_default_threshold_is_the_missions():
    assert SeriesSpec.from_dict(LEAST).threshold == 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contxt": 5}, "contxt is no setting .did you mean 'context'"),
        ({"gaps": {"polcy": "error"}}, "gaps.polcy .*'policy'"),
        ({"gaps": {"policy": "guess"}}, "gaps.policy: expected one of error, .* got 'guess'"),
        ({"gaps": {"policy": "interpolate", "limit": 0}}, "gaps.limit"),
        ({"features": {"lag": [1]}}, "features.lag is no setting .did you mean 'lags'"),
        ({"features": {"lags": [0]}}, "features.lags must hold"),
        ({"features": {"lags": [True]}}, "features.lags.0: expected a whole number"),
        ({"features": {"rolling_windows": [1]}}, "features.rolling_windows must"),
        ({"features": {"rolling_windows": [5, 5]}}, "features.rolling_windows must"),
        ({"features": {"rolling_statistics": ["mode"]}}, "features.rolling_statistics must"),
        ({"features": {"rolling_quantiles": [1.5]}}, "features.rolling_quantiles must"),
        ({"features": {"calendar": ["moon"]}}, "features.calendar must"),
        ({"features": {"streak_window": -1}}, "features.streak_window must"),
        ({"source": {"kind": "ftp"}}, "source.kind: expected .* got 'ftp'"),
        ({"source": {"kind": "files", "paths": []}}, "source.paths: expected at least one"),
        ({"source": {"kind": "files", "paths": "a.csv"}}, "source.paths: expected a list, got 'a.csv'"),
        ({"source": {"kind": "sample"}}, "source.name: expected a value, got 'none'"),
        ({"context": 0}, "context: expected 1 or more"),
        ({"context": 5.5}, "context: expected a whole number, got 5.5"),
        ({"threshold": "high"}, "threshold: expected a number"),
        ({"threshold": float("nan")}, "threshold: expected a finite"),
        ({"train_share": 0.9, "validation_share": 0.1}, "leave a test share"),
        ({"extra_columns": ["v"]}, "each column named once"),
        ({"class_edges": [2, 1]}, "class_edges: expected one or more rising"),
        ({"class_quantiles": [0.5, 1.0]}, "class_quantiles: expected shares"),
        ({"class_edges": [1], "class_quantiles": [0.5]}, "expected one of the two"),
        ({"frequency": "1 fortnight"}, "frequency: expected .* got '1 fortnight'"),
        ({"frequency": "-1h"}, "frequency: expected a positive offset"),
    ],
)
def test_refuses_a_wrong_setting_and_names_it(change, message):
    with pytest.raises(ConfigError, match=message):
        SeriesSpec.from_dict({**LEAST, **change})


def test_refuses_features_that_are_none():
    nothing = {
        "lags": [],
        "difference_lags": [],
        "rolling_windows": [],
        "calendar": [],
        "streak_window": 0,
        "share_windows": [],
    }
    with pytest.raises(ConfigError, match="at least one feature"):
        SeriesSpec.from_dict({**LEAST, "features": nothing})
