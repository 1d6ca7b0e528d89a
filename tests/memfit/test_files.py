import os
from pathlib import Path

import pytest

from memfit.files import atomic_path, fingerprint, read_json, sha256_file, write_json, write_text


def test_writes_a_whole_file_and_leaves_nothing_beside_it(tmp_path):
    write_text(tmp_path / "deep" / "note.txt", "grüß")
    assert (tmp_path / "deep" / "note.txt").read_text(encoding="utf-8") == "grüß"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["note.txt"]


def test_keeps_the_old_file_when_writing_fails_half_way(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        half()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"


def test_syncs_the_file_before_the_rename_and_the_directory_after(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: order.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    write_text(tmp_path / "note.txt", "x")
    assert len(order) == 2
    assert order[0].endswith(".tmp")
    assert order[1] == str(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_refuses_numbers_that_json_lacks_and_keeps_the_old_document(tmp_path, number):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": number})
    assert read_json(path) == {"x": 1}


def test_json_is_read_back_as_written(tmp_path):
    document = {"ä": [1, 2.5, None, True, {"x": "y"}]}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json") == document


def test_hashes_bytes_as_sha256sum_does(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    distinct = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": [1]}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]}]
    assert len({fingerprint(document) for document in distinct}) == len(distinct)
    assert len(fingerprint({})) == 16


def test_fingerprint_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"x": float("nan")})
    with pytest.raises(TypeError):
        fingerprint({"x": {1, 2}})
