"""Sources of text: every format gives the same documents, in bounded pieces; malformed and hostile files are named."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memfit.data import corpus_sources, trial
from memfit.data.corpus_sources import check_documents, find_documents, read_documents
from memfit.data.corpus_spec import CorpusSource, CorpusSpec
from memfit.data.source import hash_files
from memfit.data.spec import build
from memfit.errors import ConfigError, DataError
from memfit.process import Outcome

TEXTS = ["first\r\ntext", "  zwei\tÜ 😀\x00\x07 ", "", "last <|endoftext|>"]


def source_of(*paths, **settings):
    return build(CorpusSource, {"paths": [str(path) for path in paths], **settings}, "source.")


def read(*paths, **settings):
    source = source_of(*paths, **settings)
    return list(read_documents(source, hash_files(find_documents(source)), lambda _share: None))


@pytest.fixture
def write(tmp_path):
    """Write a file of bytes; .gz and .zst are compressed, in two frames."""

    def write(name, content):
        path = tmp_path / name
        half = len(content) // 2
        if name.endswith(".gz"):
            content = gzip.compress(content[:half]) + gzip.compress(content[half:])
        if name.endswith(".zst"):
            frames = [pa.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:])]
            content = b"".join(frames)
        path.write_bytes(content)
        return path

    return write


def json_lines(texts, key="text"):
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson.gz", "a.jsonl.zst"])
def test_json_lines_are_documents(write, name):
    content = json_lines(TEXTS) + b"\n  \n"
    assert read(write(name, content)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.log.zst", "a"])
def test_text_is_one_document_or_is_cut_at_a_separator(write, name):
    path = write(name, b"one\n\n\ntwo\n\nthree\n")
    assert read(path) == ["one\n\n\ntwo\n\nthree\n"]
    assert read(path, separator="\n\n") == ["one", "\ntwo", "three\n"]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7])
def test_documents_do_not_depend_on_where_the_file_is_cut(write, monkeypatch, chunk_bytes):
    whole = read(write("a.txt", "eins--zwei---drei–--vier--".encode()), separator="--")
    monkeypatch.setattr(corpus_sources, "CHUNK_BYTES", chunk_bytes)
    assert read(write("a.txt", "eins--zwei---drei–--vier--".encode()), separator="--") == whole
    assert whole == ["eins", "zwei", "-drei–", "vier", ""]


def test_parquet_columns_are_documents(tmp_path):
    arrays = {
        "plain": pa.array(TEXTS * 50),
        "large": pa.array(TEXTS * 50, pa.large_string()),
        "repeated": pa.array(TEXTS * 50).dictionary_encode(),
    }
    pq.write_table(pa.table(arrays), tmp_path / "a.parquet", row_group_size=70, compression="zstd")
    source = source_of(tmp_path / "*.parquet", field="repeated")
    check_documents(source, find_documents(source))
    for name in arrays:
        assert read(tmp_path / "a.parquet", field=name) == TEXTS * 50


def test_several_globs_give_each_file_once_in_order(write, tmp_path):
    write("b.txt", b"b")
    write("a.jsonl", json_lines(["a1", "a2"]))
    assert read(tmp_path / "*.txt", tmp_path / "*", tmp_path / "a.jsonl") == ["a1", "a2", "b"]


def test_the_format_may_be_said(write):
    assert read(write("a.txt", json_lines(["x"], "content")), format="jsonl", field="content") == ["x"]
    assert read(write("a.json", b"{}\n"), format="text") == ["{}\n"]


def test_a_byte_order_mark_is_no_text(write):
    assert read(write("a.txt", "\ufeffx\ufeff".encode())) == ["x\ufeff"]
    assert read(write("a.jsonl", "\ufeff".encode() + json_lines(["x"]))) == ["x"]


def test_the_share_that_is_read_rises_to_one(write):
    first, second = (write(f"{name}.jsonl.gz", json_lines(["x" * 50] * 20)) for name in "ab")
    source, shares = source_of(first, second), []
    list(read_documents(source, hash_files(find_documents(source)), shares.append))
    assert shares == sorted(shares)
    assert 0 < shares[0] < 1
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\xff", r"a\.txt, byte 4: no UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: no JSON .*Repair or remove"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: no JSON"),
        ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", r"a\.jsonl:1: no JSON"),
        ("a.json", b'[{"text": "a"}]', r"a\.json:1: expected an object, got a list"),
        ("a.jsonl", b'\n{"texts": "a"}', r"a\.jsonl:2: no field 'text' \(did you mean 'texts'\?\); it has \['texts'\]"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl:1: field 'text' is None; expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: field 'text' holds half of a surrogate pair"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read"),
    ],
)
def test_malformed_files_are_named_with_the_place(write, name, content, message):
    with pytest.raises(DataError, match=message):
        read(write(name, content))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_compressed_files_that_are_torn_or_none_are_named(write, name):
    path = write(name, b"text " * 1000)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"a\.txt\.\w+ cannot be read: .*Check that it is whole"):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


def test_documents_and_lines_have_a_bound(write, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus_sources, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(corpus_sources, "CHUNK_BYTES", 30)
    long = "x" * 101
    assert read(write("a.txt", b"x" * 100)) == ["x" * 100]
    with pytest.raises(DataError, match=r"b\.txt, byte 2: a document or line of more than .*set source\.separator"):
        read(write("b.txt", f"a;{long}".encode()), separator=";")
    with pytest.raises(DataError, match=r"c\.jsonl, byte 0: a document or line of more than"):
        read(write("c.jsonl", json_lines([long])))
    pq.write_table(pa.table({"text": [long]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet, row 1: column 'text' has 101 characters"):
        read(tmp_path / "d.parquet")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_files_that_expand_too_far_are_refused(write, monkeypatch, name):
    monkeypatch.setattr("memfit.data.limits.HARMLESS_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"bytes expand to .* or more; expected at most 200 times as many"):
        read(write(name, b" " * (3 << 20)), separator="\n")


def test_parquet_without_the_column_or_of_another_type_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["a"], "number": [1], "broken": pa.array([b"\xff"])}), path)
    for field, message in [
        ("text", r"expected one column 'text' \(did you mean 'texts'\?\), got \['texts', 'number', 'broken'\]"),
        ("number", "column 'number' has the type int64; expected text"),
        ("broken", "column 'broken' has the type binary"),
    ]:
        with pytest.raises(DataError, match=message):
            check_documents(source_of(path, field=field), [path])
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"text": broken, "empty": pa.array([None], pa.string())}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 1: no UTF-8"):
        check_documents(source_of(path), [path])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: column 'empty' is None"):
        read(path, field="empty")


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome("oom", message="died of SIGKILL", error="SIGKILL"), "takes more than the 512 MiB .*died of SIGKILL"),
        (Outcome("timeout", message="no result within 60 s"), "takes more than the 60 s"),
    ],
)
def test_a_parquet_file_that_ends_its_child_is_named(tmp_path, monkeypatch, outcome, said):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path)
    outcome.phase = str(path)
    monkeypatch.setattr(trial, "run_child", lambda *_arguments, **_settings: outcome)
    with pytest.raises(DataError, match=rf"a\.parquet: decoding it {said}.*Check where it comes from"):
        check_documents(source_of(path), [path])


def test_a_file_that_changes_while_it_is_read_is_an_error(write):
    path = write("a.jsonl", json_lines(["a", "b"]))
    source = source_of(path)
    reading = read_documents(source, hash_files([path]), lambda _share: None)
    assert next(reading) == "a"
    with path.open("ab") as opened:
        opened.write(b" ")
    with pytest.raises(DataError, match="changed while it was read"):
        list(reading)


def test_sources_that_are_not_there_are_named(tmp_path, write):
    write("corpus.txt", b"x")
    with pytest.raises(DataError, match=r"no such file \(did you mean 'corpus.txt'\?\)"):
        read(tmp_path / "corpsu.txt")
    with pytest.raises(DataError, match="the glob matches no file"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match="is a directory; expected a file or a glob"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"source": {}}, "source.paths: expected at least one path or glob"),
        ({"source": {"kind": "sample", "paths": ["x"]}}, "source.paths: expected none"),
        ({"source": {"kind": "web"}}, "source.kind: expected one of files, sample"),
        ({"source": {"kind": "sample", "name": "books"}}, "source.name: expected one of pydoc_topics"),
        ({"source": {"paths": ["x"], "format": "csv"}}, "source.format: expected one of auto, text, jsonl, parquet"),
        ({"source": {"paths": ["x"], "filed": "x"}}, r"source.filed is no setting \(did you mean 'field'\?\)"),
        ({"tokenizer": {"vocab_size": 256}}, "tokenizer.vocab_size: expected 257 to 1048576 tokens, got 256"),
        ({"validation_share": 0.5, "test_share": 0.5}, "expected two shares that leave a train share"),
        ({"near_duplicates": 2}, "near_duplicates: expected a share from 0 to 1"),
        ({"end_of_text": ""}, "end_of_text: expected 1 to 1024 characters"),
        ({"max_documents": 0}, "max_documents: expected 1 or more"),
        (["source"], "data: expected a table"),
    ],
)
def test_refuses_settings_that_cannot_work(document, message):
    if isinstance(document, dict):
        document = {"source": {"kind": "sample"}, **document}
    with pytest.raises(ConfigError, match=message):
        CorpusSpec.from_dict(document)


def test_a_spec_is_its_document():
    document = {"source": {"paths": ["a", "b"]}, "tokenizer": {"path": "x"}, "max_documents": 3, "near_duplicates": 0}
    spec = CorpusSpec.from_dict(document)
    assert CorpusSpec.from_dict(spec.to_dict()) == spec
    assert np.isclose(spec.validation_share, 0.05)
