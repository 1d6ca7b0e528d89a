import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from memfit.export.infer import BundleError, InputError, MismatchError, Model, bind_inputs, main
from memfit.files import sha256_file

START = datetime(2024, 3, 1, tzinfo=UTC)
STANDALONE = """
import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
status = 0
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as done:
    status = done.code
heavy = {"torch", "memfit", "pandas", "onnx", "onnxscript"} & {name.split(".")[0] for name in sys.modules}
assert not heavy, heavy
sys.exit(status)
"""


def history(rows=30):
    random = np.random.default_rng(5)
    times = [START + timedelta(hours=i) for i in range(rows)]
    return times, random.normal(900, 120, rows), random.normal(0, 5, (rows, 1))


def write_history(path, times, values, extras):
    rows = [f"{t.isoformat()},{w[0]!r},{v!r},note" for t, v, w in zip(times, values.tolist(), extras.tolist())]
    path.write_text("\n".join(["time,wind,pressure,remark", *rows]) + "\n")
    return path


def samples(bundle):
    with np.load(bundle / "sample_inputs.npz") as opened:
        return {name: opened[name] for name in opened.files}


def run_standalone(bundle, cwd, *arguments):
    command = [sys.executable, "-I", "-W", "error", "-c", STANDALONE, bundle / "infer.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={}, timeout=60)


def test_shipped_file_needs_neither_torch_nor_memfit_nor_its_own_folder(bundle, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    listing = {path.name for path in bundle.iterdir()}
    done = run_standalone(bundle, elsewhere, "check")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["within_tolerance"]["value"]["within"]
    table = write_history(elsewhere / "h.csv", *history())
    done = run_standalone(bundle, elsewhere, "predict", "--csv", table)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["after"] == "2024-03-02T05:00:00Z"
    assert {path.name for path in bundle.iterdir()} == listing


def test_check_fails_on_a_wrong_expectation(bundle, capsys):
    path = bundle / "expected_outputs.npz"
    with np.load(path) as opened:
        arrays = {name: opened[name] for name in opened.files}
    arrays["value"][3] += 1
    np.savez(path, **arrays)
    with pytest.raises(BundleError, match="expected sha256"):
        Model(bundle).check()
    adopt(bundle, "expected_outputs.npz")
    with pytest.raises(MismatchError, match=r"beyond tolerance: \['value'\]"):
        Model(bundle).check()
    assert main(["--folder", str(bundle), "check"]) == 1
    assert "beyond tolerance" in capsys.readouterr().err


def adopt(bundle, name):
    """Write the present hash of a changed file into the card."""
    card = json.loads((bundle / "model_card.json").read_text())
    card["files"][name]["sha256"] = sha256_file(bundle / name)
    (bundle / "model_card.json").write_text(json.dumps(card))


def test_changed_model_is_not_loaded(bundle):
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx: expected sha256"):
        Model(bundle)


def test_changed_features_code_is_not_run(bundle):
    with (bundle / "features.py").open("a") as opened:
        opened.write("raise SystemExit('ran')\n")
    with pytest.raises(BundleError, match=r"features\.py: expected sha256"):
        Model(bundle).predict_series(*history())


def test_incomplete_bundle_is_named(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"model_card\.json is not there"):
        Model(tmp_path)
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is not there"):
        Model(bundle)


def test_card_of_another_schema_is_refused(bundle):
    (bundle / "model_card.json").write_text('{"schema": 2}')
    with pytest.raises(BundleError, match="expected schema 1, got 2"):
        Model(bundle)
    (bundle / "model_card.json").write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        Model(bundle)


def test_absent_provider_is_an_error_not_a_fallback(bundle):
    with pytest.raises(BundleError, match="'NoSuchProvider'"):
        Model(bundle, ["NoSuchProvider", "CPUExecutionProvider"])


def test_provider_that_does_not_start_is_an_error(bundle, monkeypatch):
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda _: ["OtherExecutionProvider"])
    with pytest.raises(BundleError, match="expected CPUExecutionProvider to run"):
        Model(bundle)


def test_float64_and_lists_are_cast(bundle):
    model, arrays = Model(bundle), samples(bundle)
    exact = model.predict(**arrays)
    wide = model.predict(history=arrays["history"].tolist(), features=arrays["features"].astype(np.float64))
    for name in exact:
        np.testing.assert_array_equal(exact[name], wide[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("features"), r"missing: \['features'\], unknown: \[\]"),
        (lambda a: a.update(feature=a["features"]), r"unknown: \['feature'\]"),
        (lambda a: a.update(history=a["history"][:, 1:]), r"expected shape \[batch, 12\], got \[9, 11\]"),
        (lambda a: a.update(history=a["history"][0]), r"got \[12\]; for a single row pass history\[None\]"),
        (lambda a: a.update(history=a["history"][:4]), r"'features': .* got \[9, 2\]; 'batch' is 4 in input 'history'"),
        (lambda a: a.update(history=a["history"][:0], features=a["features"][:0]), "must not be empty"),
        (lambda a: a.update(history=a["history"].astype(str)), "expected dtype float32, got <U"),
        (lambda a: a.update(history=a["history"].astype(complex)), "expected dtype float32, got complex128"),
        (lambda a: a["history"].__setitem__((2, 5), np.nan), r"1 of 108 values .* the first at \[2, 5\] is nan"),
        (lambda a: a.update(history=a["history"] * np.float64(1e300)), "do not fit float32"),
    ],
)
def test_unfit_input_is_named_with_what_was_expected(bundle, change, message):
    arrays = samples(bundle)
    change(arrays)
    with pytest.raises(InputError, match=message):
        Model(bundle).predict(**arrays)


def test_integers_are_cast_only_where_they_fit():
    spec = [{"name": "tokens", "shape": ["batch"], "dtype": "int32"}]
    assert bind_inputs(spec, {"tokens": [1, 2]})["tokens"].dtype == np.int32
    with pytest.raises(InputError, match="do not fit int32"):
        bind_inputs(spec, {"tokens": [1, 2**40]})
    with pytest.raises(InputError, match="expected dtype int32, got float64"):
        bind_inputs(spec, {"tokens": [1.0]})


def test_series_prediction_is_that_of_hand_made_inputs(bundle):
    times, values, extras = history()
    model = Model(bundle)
    got = model.predict_series(times, values, extras)
    features = [[values[-4:].max(), extras[-1, 0] - 950.0]]
    wanted = model.predict(history=values[None, -12:], features=features)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array[0])
    assert (got["after"], got["time"]) == ("2024-03-02T05:00:00Z", "2024-03-02T06:00:00Z")


def test_series_prediction_reads_only_the_rows_it_needs(bundle):
    times, values, extras = history()
    values[:-12] = np.nan
    model = Model(bundle)
    assert model.rows_needed == 12
    whole, cut = model.predict_series(times, values, extras), model.predict_series(times[18:], values[18:], extras[18:])
    assert {k: str(v) for k, v in whole.items()} == {k: str(v) for k, v in cut.items()}


def test_times_may_be_texts_datetimes_or_nanoseconds(bundle):
    times, values, extras = history()
    naive = [time.replace(tzinfo=None) for time in times]
    nanoseconds = np.array([int(time.timestamp()) * 10**9 for time in times])
    shifted = [time.astimezone(tz=None).isoformat() for time in times]
    model = Model(bundle)
    forms = [times, naive, nanoseconds, np.array(naive, "datetime64[s]"), shifted]
    assert {model.predict_series(form, values, extras)["time"] for form in forms} == {"2024-03-02T06:00:00Z"}


def changed_history(name):
    times, values, extras = history()
    if name == "short":
        return times[:11], values[:11], extras[:11]
    if name == "nan":
        values[-1] = np.nan
    if name == "repeated":
        times[-1] = times[-2]
    if name == "gap":
        times[-1] += timedelta(hours=1)
    if name == "float times":
        times = np.arange(30.0)
    if name == "text":
        times = ["yesterday"] * 30
    return times, values, None if name == "no extras" else extras


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "at least 12 rows, got 11"),
        ("nan", "the last 12 rows hold NaN"),
        ("repeated", "strictly increasing"),
        ("gap", "expected a row every 1h, but 2024-03-02T06:00:00Z follows 2024-03-02T04:00:00Z"),
        ("float times", "got float64"),
        ("text", "expected ISO 8601"),
        ("no extras", r"the extra columns are \['wind'\]"),
    ],
)
def test_unfit_history_is_refused(bundle, name, message):
    with pytest.raises(InputError, match=message):
        Model(bundle).predict_series(*changed_history(name))


def test_irregular_series_predicts_without_a_time(bundle):
    card = json.loads((bundle / "model_card.json").read_text())
    card["series"]["frequency"] = "irregular"
    (bundle / "model_card.json").write_text(json.dumps(card))
    assert Model(bundle).predict_series(*changed_history("gap"))["time"] is None


def test_csv_and_arrays_predict_the_same(bundle, tmp_path, capsys):
    rows = history()
    table = write_history(tmp_path / "h.csv", *rows)
    assert main(["--folder", str(bundle), "predict", "--csv", str(table)]) == 0
    printed = json.loads(capsys.readouterr().out)
    wanted = Model(bundle).predict_series(*rows)
    assert printed["value"] == pytest.approx(float(wanted["value"]), rel=1e-7)
    assert len(printed["class_probabilities"]) == 3
    out = tmp_path / "result"
    assert main(["--folder", str(bundle), "predict", "--csv", str(table), "--out", str(out)]) == 0
    with np.load(out) as opened:
        assert opened["value"] == wanted["value"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("wind", "w", r"column \['wind'\] is not there"), ("2024-03-02T05", "05", "line 31: time")],
)
def test_unfit_csv_names_file_and_line(bundle, tmp_path, capsys, old, new, message):
    table = write_history(tmp_path / "h.csv", *history())
    table.write_text(table.read_text().replace(old, new))
    assert main(["--folder", str(bundle), "predict", "--csv", str(table)]) == 2
    error = capsys.readouterr().err
    assert str(table) in error
    assert re.search(message, error)


def test_predict_from_npz_writes_what_check_expects(bundle, tmp_path):
    out = tmp_path / "out.npz"
    arguments = ["--folder", str(bundle), "predict", "--inputs", str(bundle / "sample_inputs.npz"), "--out", str(out)]
    assert main(arguments) == 0
    with np.load(out) as got, np.load(bundle / "expected_outputs.npz") as expected:
        assert set(got.files) == set(expected.files)
        np.testing.assert_allclose(got["value"], expected["value"], rtol=1e-5)


def test_info_names_inputs_units_and_metrics(bundle, capsys):
    assert main(["--folder", str(bundle), "info"]) == 0
    text = capsys.readouterr().out
    assert "history: float32 [batch, 12] in hPa  The newest values" in text
    assert "metric mae: 1.25" in text
    assert main(["--folder", str(bundle), "info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((bundle / "model_card.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["predict", "--inputs", "nowhere.npz"], 2),
        (["predict", "--csv", "nowhere.csv"], 2),
        (["--folder", "nowhere", "info"], 3),
        (["--provider", "NoSuchProvider", "info"], 3),
    ],
)
def test_exit_status_tells_input_from_bundle(bundle, arguments, status, capsys):
    if "--folder" not in arguments:
        arguments = ["--folder", str(bundle), *arguments]
    assert main(arguments) == status
    assert capsys.readouterr().err.startswith("error: ")


def test_file_of_another_kind_is_an_input_error(bundle, tmp_path):
    wrong = tmp_path / "x.npz"
    for content in (b"text", (bundle / "model.onnx").read_bytes()):
        wrong.write_bytes(content)
        assert main(["--folder", str(bundle), "predict", "--inputs", str(wrong)]) == 2
    np.save(tmp_path / "x.npy", np.ones(3))
    shutil.move(tmp_path / "x.npy", wrong)
    assert main(["--folder", str(bundle), "predict", "--inputs", str(wrong)]) == 2


def test_help_lists_verbs_and_exit_status(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "exit status:" in text
    assert all(verb in text for verb in ("check", "info", "predict"))


def test_model_without_a_series_section_says_so(bundle):
    card = json.loads((bundle / "model_card.json").read_text())
    del card["series"]
    (bundle / "model_card.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="does not predict a series"):
        Model(bundle).predict_series(*history())
