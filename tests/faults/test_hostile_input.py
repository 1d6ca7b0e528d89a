"""Input that means harm: it is refused with a clear error, in bounded memory and time, and nothing of it is run."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from memfit.config import MAX_CONFIG_BYTES, load_config
from memfit.data.prepare import prepare_series
from memfit.data.spec import SeriesSpec
from memfit.data.store import is_whole
from memfit.errors import CheckpointError, ConfigError, DataError, ExportError
from memfit.export.bundle import check_request
from memfit.export.infer import BundleError, Model
from memfit.export.model_file import check_model_file
from memfit.files import fingerprint, read_json, sha256_file, write_json
from memfit.process import run_child
from memfit.training.checkpoint import load_checkpoint, newest, save_checkpoint
from tests.faults import hostile_targets
from tests.faults.hostile_targets import CSV, MIB, PARQUET, sparse

PEAK_BYTES = 256 * MIB
"""What refusing may take beyond what the process held."""
CHILD_BYTES = 700 * MIB
"""What the child that tries a Parquet file may take in all: its libraries, and 512 MiB."""
SECONDS = 20.0
"""What one refusal may take; the slowest takes three on two idle cores."""


@pytest.fixture(scope="module")
def in_child(tmp_path_factory):
    """Run one of hostile_targets' functions in a child."""
    log = tmp_path_factory.mktemp("logs") / "log"
    root = str(Path(__file__).parents[2])

    def run(target: str, **payload):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]))
            outcome = run_child(f"{hostile_targets.__name__}:{target}", payload, log=log, deadline_seconds=200)
        return outcome.unwrap(target)

    return run


def refused(result, error: str, said: str) -> None:
    assert (result["error"], said in result["message"]) == (error, True), result
    assert len(result["message"]) < 2500
    assert result["peak_bytes"] < PEAK_BYTES, result
    assert result["children_bytes"] < CHILD_BYTES, result
    assert result["seconds"] < SECONDS, result


# sources


@pytest.fixture(scope="module")
def read_sources(in_child, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    made = in_child("make_sources", folder=str(folder))
    yield in_child("read_sources", sources=made, store=str(folder / "store"))
    shutil.rmtree(folder)


LONG_ROW = "a row is longer than 1 MiB; expected a table of short rows"
SOURCES = {
    "zeros": LONG_ROW,
    "zeros below a header": LONG_ROW,
    "quote that never closes": LONG_ROW,
    "zeros below good rows": LONG_ROW,
    "larger than any disk": "expected at most 64 GiB, got 1024 GiB. Split it",
    "a million columns": "1000002 columns; expected at most 8192. Drop the others",
    "many columns below a quoted line": "400003 columns; expected at most 8192",
    "gzip of one line": LONG_ROW,
    "gzip of empty lines": "expected at most 200 times as many, or 256 MiB",
    "gzip of one row": "rows 1 and 2 have the same time",
    "repeated rows": "expand to 1,600,000,000 or more; expected at most 1000 times as many, or 256 MiB",
    "pages larger than stated": "a batch of 65,536 rows takes more memory than there is for it",
    "repeated text": "a batch of 65,536 rows takes more memory than there is for it",
    "text by its difference": "a batch of 65,536 rows takes more memory than there is for it",
    "many columns": "9002 columns; expected at most 8192. Drop the others",
    "huge footer": "a footer of 1,073,741,824 bytes; expected at most 32 MiB",
}


def test_every_hostile_source_has_its_message():
    assert SOURCES.keys() == {**CSV, **PARQUET}.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_would_fill_memory_is_refused(read_sources, name):
    refused(read_sources[name], "DataError", SOURCES[name])


# configs

DEEP = "expected tables and lists at most 32 deep"
WIDE = "expected integers of 64 bits"
HALF = MAX_CONFIG_BYTES // 2
CONFIGS = {
    "10 MB": ("#" * 10_000_000, "expected a config of at most 1 MiB, got 10000000 bytes"),
    "nested lists": ("a = " + "[" * HALF, DEEP),
    "nested tables": ("a = " + "{a=" * (HALF // 2), DEEP),
    "a long key": ("a." * (HALF - 4) + "a = 1", DEEP),
    "a long quoted key": ('"a".' * (HALF // 2 - 4) + "a = 1", DEEP),
    "a table of long name": ("[" + "a." * (HALF - 4) + "a]", DEEP),
    "an integer": ("a = " + "9" * HALF, WIDE),
    "a hexadecimal integer": ("a = 0x" + "f" * HALF, WIDE),
    "unknown keys": ("".join(f"a{index} = 1\n" for index in range(80_000)), "and 79983 more"),
    "tables": ("[[stages]]\n" * 90_000, "expected at most 4096 tables"),
    "stages": ("[[stages]]\n" * 4000, "and 15983 more"),
    "variants": ("[model.variants]\n" + "".join(f"a{i} = {{}}\n" for i in range(70_000)), "at most 4096 tables"),
    "escapes": ('a = "' + '\\"' * (HALF - 8), "not TOML: Unterminated string"),
}
OVERRIDES = {
    "data.unit=" + "x" * 2_000_000: "expected at most 16384 characters, got 2000010",
    "a." * 8000 + "a=1": "expected a key of at most 32 parts, got 8001",
    "data.unit=" + "[" * 8000: DEEP,
    "seed=" + "9" * 8000: WIDE,
    "seed=" + "9" * 19: WIDE,
    "stages." + "9" * 8000 + ".lr=1": "expected an index from 0 to 1",
    "stages.².lr=1": "expected an index from 0 to 1, got '²'",
    "stages.0.lr=1e999": "finite number, got inf",
    "stages.0.global_batch_size=99999999999": "less than or equal to 16777216",
    "model.windows=[1000000000]": "less than or equal to 1048576",
    "model.d_model=100000000": "less than or equal to 1048576",
    "model.num_layers=100000": "less than or equal to 1024",
    "model.tcn_levels=1000": "less than or equal to 32",
    "data.gaps.limit=1000000000": "gaps.limit: expected at most 1048576 rows",
    "data.features.lags=[1000000000]": "features.lags: expected at most 1048576 rows",
    f"data.features.lags={[*range(1, 300)]}": "features.lags: expected at most 256 entries, got 299",
    f"data.class_quantiles={[index / 301 for index in range(1, 301)]}": "class_quantiles: expected at most 256 numbers",
    f"data.extra_columns={[f'c{index}' for index in range(1100)]}": "at most 1024 items",
    f"data.features={{rolling_windows={[*range(2, 202)]}, rolling_quantiles={[i / 201 for i in range(1, 201)]}}}": (
        "features: expected at most 8192 in all, got 41"
    ),
    f"data.frequency={'9' * 30}h": "frequency: expected",
    f"data.time_column={'t' * 2000}": "at most 1024 characters",
    f"plan.budget={'9' * 100}GiB": "at most 64 characters",
    f"plan.precisions={['fp32'] * 9}": "at most 8 items",
}


@pytest.fixture(scope="module")
def read_configs(in_child, tmp_path_factory, tiny_config_text):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "base.toml").write_text(tiny_config_text, encoding="utf-8")
    paths = {}
    for name, (text, _) in CONFIGS.items():
        path = folder / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        paths[name] = str(path)
    overrides = {text[:60]: text for text in OVERRIDES}
    assert len(overrides) == len(OVERRIDES)
    paths["a device without an end"] = "/dev/zero"
    return in_child("read_configs", configs=paths, base=str(folder / "base.toml"), overrides=overrides)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_would_take_memory_or_time_is_refused(read_configs, name):
    refused(read_configs[name], "ConfigError", CONFIGS[name][1])


def test_a_config_without_an_end_is_refused(read_configs):
    refused(read_configs["a device without an end"], "ConfigError", "expected a config of at most 1 MiB")


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:30])
def test_an_override_beyond_what_can_be_meant_is_refused(read_configs, override):
    refused(read_configs[override[:60]], "ConfigError", OVERRIDES[override])


# names

NAMES = ["..", ".", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "", "~", "a\n", "a\0b", "-rf", "x" * 65]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["name", "stages.0.name", "plan.variants.0"])
def test_names_that_become_paths_are_plain(tiny_config, name, key):
    with pytest.raises(ConfigError, match=r"pattern|valid string|expected"):
        load_config(tiny_config, ["plan.variants=['light']", f"{key}={json.dumps(name)}"])


@pytest.mark.parametrize("name", NAMES)
def test_a_variants_name_is_plain(tiny_config, name):
    text = tiny_config.read_text(encoding="utf-8")
    tiny_config.write_text(f"{text}\n[model.variants.{json.dumps(name)}]\nd_model = 4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="pattern"):
        load_config(tiny_config)


def test_columns_and_files_may_be_called_anything_and_nothing_is_written_elsewhere(tmp_path):
    column, folder = "../../escaped", tmp_path / "deep" / "store"
    source = tmp_path / "..csv"
    hours = np.datetime64("2024-01-01T00", "h") + np.arange(60)
    rows = [f"{hour}:00,{index % 7},{index % 5}" for index, hour in enumerate(hours)]
    source.write_text("\n".join([f"/etc/passwd,{column},{column}2", *rows]) + "\n", encoding="utf-8")
    spec = SeriesSpec.from_dict(
        {
            "source": {"kind": "files", "paths": [str(source)]},
            "time_column": "/etc/passwd",
            "value_column": column,
            "extra_columns": [f"{column}2"],
            "context": 8,
            "features": {"lags": [1, 2], "rolling_windows": [4], "share_windows": [4], "extra_mean_windows": [4]}
            | {"difference_lags": [1], "extra_lags": [1], "streak_window": 3},
        }
    )
    prepared = prepare_series(spec, folder, code_version="1")
    assert prepared.parent == folder
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "..csv"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"store"}


@pytest.mark.parametrize(
    "path", ["\0", "x" * 5000, "~nobody-of-this-name/a.csv", "/dev/zero", "..", "/proc/self/mem.csv"]
)
def test_a_source_that_is_no_file_is_refused(path):
    source = {"kind": "files", "paths": [path]}
    spec = SeriesSpec.from_dict({"source": source, "time_column": "time", "value_column": "value", "context": 8})
    with pytest.raises(DataError) as raised:
        prepare_series(spec, Path("nowhere"), code_version="1")
    assert len(str(raised.value)) < 6000
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("name", ["../outside", "..", "/dev/zero", "deep/inside"])
def test_a_manifest_names_no_file_outside_its_directory(tmp_path, name):
    folder = tmp_path / "prepared"
    (folder / "deep").mkdir(parents=True)
    for path in (tmp_path / "outside", folder / "deep" / "inside", folder / "plain"):
        path.write_bytes(b"x")

    def manifest(file: str, content: Path) -> None:
        told = {"bytes": 1, "sha256": sha256_file(content)}
        whole = {"fingerprint": "prepared", "arrays": {file: told}}
        write_json(folder / "manifest.json", {**whole, "checksum": fingerprint(whole)})

    manifest("plain", folder / "plain")
    assert is_whole(folder, "prepared")
    manifest(name, tmp_path / "outside")
    assert not is_whole(folder, "prepared")


# checkpoints


class Payload:
    """A pickle of this makes a directory where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def zipped_pickle(content: bytes) -> bytes:
    """Put a pickle where torch looks for it in a zip file."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return written.getvalue()


def legacy(payload: Payload) -> bytes:
    """Write what torch wrote before it used zip files."""
    written = io.BytesIO()
    torch.save({"optimizer": payload}, written, _use_new_zipfile_serialization=False)
    return written.getvalue()


def modern(payload: Payload) -> bytes:
    written = io.BytesIO()
    torch.save({"progress": payload}, written)
    return written.getvalue()


STATES = {
    "zip": modern,
    "zip made by hand": lambda payload: zipped_pickle(pickle.dumps(payload, protocol=2)),
    "legacy": legacy,
    "bare pickle": lambda payload: pickle.dumps(payload, protocol=2),
    "newest pickle": lambda payload: pickle.dumps({"a": payload}),
    "text pickle": lambda payload: pickle.dumps(payload, protocol=0),
}
HEADERS = {
    "giant header": (2**60).to_bytes(8, "little") + b"{}",
    "longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "no JSON": (9).to_bytes(8, "little") + b"not json!",
    "nested": (20_000).to_bytes(8, "little") + b"[" * 20_000,
    "beyond the file": b"",
    "pickle": pickle.dumps({"weight": 1}, protocol=0),
}
HEADERS["beyond the file"] = (lambda text: len(text).to_bytes(8, "little") + text)(
    b'{"weight":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "steps").mkdir(exist_ok=True)
    return save_checkpoint(
        tmp_path / "steps", torch.nn.Linear(3, 2).state_dict(), {"progress": {}}, {"step": 2}, ("last",)
    )


def seal(folder: Path) -> None:
    """Make the record agree with the files, as an attacker would."""
    record = read_json(folder / "checkpoint.json")
    hashes = {name: sha256_file(folder / name) for name in record["sha256"]}
    write_json(folder / "checkpoint.json", {**record, "sha256": hashes})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("kind", STATES)
def test_a_checkpoint_that_holds_code_is_refused_and_runs_nothing(tmp_path, checkpoint, kind, sealed):
    trace = tmp_path / "ran"
    (checkpoint / "state.pt").write_bytes(STATES[kind](Payload(trace)))
    if sealed:
        seal(checkpoint)
    with pytest.raises(CheckpointError, match="not a usable checkpoint" if sealed else "it is corrupt"):
        load_checkpoint(checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["legacy", "bare pickle", "text pickle"])
def test_those_payloads_do_run_where_pickles_are_trusted(tmp_path, kind):
    trace = tmp_path / "ran"
    torch.load(io.BytesIO(STATES[kind](Payload(trace))), weights_only=False) if kind == "legacy" else pickle.loads(
        STATES[kind](Payload(trace))
    )
    assert trace.exists()


@pytest.mark.parametrize("kind", HEADERS)
def test_weights_with_a_header_that_lies_are_refused(checkpoint, kind):
    (checkpoint / "model.safetensors").write_bytes(HEADERS[kind])
    seal(checkpoint)
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["../../outside", "/dev/zero"])
def test_a_checkpoints_record_names_no_other_files(checkpoint, name):
    record = read_json(checkpoint / "checkpoint.json")
    write_json(checkpoint / "checkpoint.json", {**record, "sha256": {name: record["sha256"]["state.pt"]}})
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        load_checkpoint(checkpoint)


# ONNX


def graph_of(
    location: str | None = None,
    *,
    domain: str = "",
    operator: str = "Add",
    opset: int = 20,
    ir_version: int = 10,
    size: int = 4,
    name: str = "x",
):
    x, y = (helper.make_tensor_value_info(each, TensorProto.FLOAT, ["batch", size]) for each in (name, "y"))
    one = onnx.numpy_helper.from_array(np.ones(size, np.float32), "one")
    if location is not None:
        one.ClearField("raw_data")
        one.data_location = TensorProto.EXTERNAL
        one.external_data.add(key="location", value=location)
    node = helper.make_node(operator, [name, "one"], ["y"], domain=domain)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    body = helper.make_graph([node], "g", [x], [y], [one])
    return helper.make_model(body, opset_imports=opsets, ir_version=ir_version)


def hidden_operator():
    """Put an operator of another domain, not declared, into a branch."""
    model = graph_of()
    inner = helper.make_node("Boom", [], ["z"], domain="elsewhere")
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [])])
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    model.graph.initializer.append(condition)
    model.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))
    return model


def own_function():
    model = graph_of()
    inner = helper.make_node("Add", ["a", "a"], ["b"])
    model.functions.append(helper.make_function("", "Twice", ["a"], ["b"], [inner], [helper.make_opsetid("", 20)]))
    return model


GRAPHS = {
    "weights above the folder": (lambda: graph_of("../secret"), "outside the directory"),
    "weights of an absolute path": (lambda: graph_of("/etc/passwd"), "absolute path"),
    "weights behind a link": (lambda: graph_of("link"), "symbolic link"),
    "weights that are not there": (lambda: graph_of("nowhere"), "not regular file"),
    "another operator set": (
        lambda: graph_of(domain="elsewhere", operator="Boom"),
        r"operator sets of \['elsewhere'\]",
    ),
    "a hidden operator": (hidden_operator, "got elsewhere:Boom"),
    "an unknown operator": (lambda: graph_of(operator="Boom"), "refuses the graph: No Op registered for Boom"),
    "a function of its own": (own_function, r"no functions of its own, got \['Twice'\]"),
    "an old opset": (lambda: graph_of(opset=6), "an opset from 7 to"),
    "an opset to come": (lambda: graph_of(opset=99), "an opset from 7 to"),
    "an IR version to come": (lambda: graph_of(ir_version=99), "an IR version up to"),
}


def put(folder: Path, model) -> Path:
    folder.mkdir(exist_ok=True)
    (folder.parent / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    (folder / "link").symlink_to(folder.parent / "secret")
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("name", GRAPHS)
def test_an_onnx_file_is_checked_before_it_is_scored(tmp_path, name):
    make, said = GRAPHS[name]
    with pytest.raises(ExportError, match=said):
        check_model_file(put(tmp_path / "bundle", make()))


def test_an_onnx_file_that_is_well_passes(tmp_path):
    check_model_file(put(tmp_path / "bundle", graph_of()))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x02}q\x00."])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError):
        check_model_file(path)


def test_a_file_beyond_one_protobuf_is_refused_unread(tmp_path):
    with pytest.raises(ExportError, match="expected at most 2147483647 bytes"):
        check_model_file(sparse(tmp_path / "model.onnx", b""))


# bundles: what infer.py checks with numpy and onnxruntime alone

SIGNATURE = {
    "inputs": [{"name": "x", "shape": ["batch", 4], "dtype": "float32", "unit": "", "description": ""}],
    "outputs": [{"name": "y", "shape": ["batch", 4], "dtype": "float32", "unit": "", "description": ""}],
}


def bundle(folder: Path, model, **changes) -> Path:
    path = put(folder, model)
    files = {"model.onnx": {"sha256": sha256_file(path), "bytes": path.stat().st_size}}
    write_json(folder / "model_card.json", {"schema": 1, "signature": SIGNATURE, "files": files, **changes})
    return folder


def test_a_bundle_that_is_well_runs(tmp_path):
    model = Model(bundle(tmp_path / "bundle", graph_of()))
    np.testing.assert_array_equal(model.predict(x=np.zeros((2, 4), np.float32))["y"], 1)


@pytest.mark.parametrize(
    "name", ["weights above the folder", "weights of an absolute path", "weights behind a link", "another operator set"]
)
def test_a_bundle_whose_graph_reaches_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(BundleError, match="onnxruntime does not load it"):
        Model(bundle(tmp_path / "bundle", GRAPHS[name][0]()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 5}, r"expected 'x' as tensor\(float\) \['batch', 4\]"),
        ({"name": "z"}, r"says \['x'\], the graph \['z'\]"),
    ],
)
def test_a_graph_that_is_not_what_the_card_says_is_refused(tmp_path, change, said):
    with pytest.raises(BundleError, match=said):
        Model(bundle(tmp_path / "bundle", graph_of(**change)))


CARDS = {
    "files elsewhere": {"files": {"../secret": {"sha256": "0", "bytes": 1}}},
    "a device": {"files": {"/dev/zero": {"sha256": "0", "bytes": 1}}},
    "the folder above": {"files": {"..": {"sha256": "0", "bytes": 1}}},
    "files without hashes": {"files": {"model.onnx": {}}},
    "files as a list": {"files": ["model.onnx"]},
    "no signature": {"signature": None},
    "an empty signature": {"signature": {"inputs": [], "outputs": []}},
    "a dtype of none": {"signature": {**SIGNATURE, "inputs": [{"name": "x", "shape": ["batch", 4], "dtype": "O8x"}]}},
    "a shape of none": {"signature": {**SIGNATURE, "inputs": [{"name": "x", "shape": [None], "dtype": "float32"}]}},
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_of_another_kind_is_refused(tmp_path, name):
    with pytest.raises(BundleError, match="copy the bundle again"):
        Model(bundle(tmp_path / "bundle", graph_of(), **CARDS[name]))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", '{"schema": 1}'])
def test_a_card_that_is_no_card_is_refused(tmp_path, text):
    folder = bundle(tmp_path / "bundle", graph_of())
    (folder / "model_card.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError):
        Model(folder)


def test_files_of_another_size_are_refused_unread(tmp_path):
    folder = bundle(tmp_path / "bundle", graph_of())
    sparse(folder / "model.onnx", b"")
    with pytest.raises(BundleError, match=r"expected sha256 .* got 10737418240 bytes"):
        Model(folder)
    sparse(folder / "model_card.json", b"{")
    with pytest.raises(BundleError, match="expected at most 67108864 bytes"):
        Model(folder)


@pytest.mark.parametrize("name", ["../infer.py", "..", "/etc/passwd", "deep/features.py", ""])
def test_support_files_stay_in_the_bundle(name):
    with pytest.raises(ExportError, match="expected a plain name"):
        check_request({"name": "model"}, {name: Path(__file__)})


def test_what_a_bundle_is_asked_to_read_is_bounded(in_child, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(75_000_000, np.float32))
    found = in_child("read_arrays", csv=str(sparse(tmp_path / "a.csv", b"time,value\n")), npz=str(tmp_path / "a.npz"))
    refused(found["csv"], "InputError", "a line is longer than 262144 characters")
    refused(found["npz"], "InputError", "expected to expand to 200 times its size at most")


@pytest.mark.parametrize(
    "change", [{"links": ["../../victim"]}, {"links": ["/tmp/x"]}, {"links": [1]}, {"best_step": "1/../../victim"}]
)
def test_a_checkpoints_links_stay_beside_it(tmp_path, checkpoint, change):
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    write_json(checkpoint / "checkpoint.json", {**read_json(checkpoint / "checkpoint.json"), **change})
    with pytest.warns(RuntimeWarning, match="not a usable checkpoint"):
        assert newest(checkpoint.parent) is None
    assert not victim.is_symlink()
    assert victim.read_text(encoding="utf-8") == "precious"


def test_a_folder_that_is_no_step_is_passed_over(checkpoint):
    for name in ("step-²", "step-", f"step-{'9' * 30}", "step-1x"):
        (checkpoint.parent / name).mkdir()
    found = newest(checkpoint.parent)
    assert found is not None
    assert found.record["step"] == 2
