import pytest

from memfit.errors import ExportError
from memfit.export.directory import replace_directory


def write(folder, text):
    (folder / "card").write_text(text)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "deep" / "export"


def test_directory_appears_only_when_complete(target):
    with replace_directory(target, marker="card") as folder:
        write(folder, "new")
        assert not target.exists()
    assert (target / "card").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_old_directory_is_replaced_whole(target):
    with replace_directory(target, marker="card") as folder:
        write(folder, "old")
        (folder / "left over").touch()
    with replace_directory(target, marker="card") as folder:
        write(folder, "new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"card": "new"}


def test_old_directory_survives_a_failure(target):
    with replace_directory(target, marker="card") as folder:
        write(folder, "old")

    def fail_halfway():
        with replace_directory(target, marker="card") as folder:
            write(folder, "half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert (target / "card").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_old_directory_comes_back_when_the_move_fails(target, monkeypatch):
    with replace_directory(target, marker="card") as folder:
        write(folder, "old")
    rename = type(target).rename

    def fail_for_new(path, to):
        if path.name.endswith(".building"):
            raise OSError("disk gone")
        return rename(path, to)

    monkeypatch.setattr(type(target), "rename", fail_for_new)
    with pytest.raises(OSError, match="disk gone"), replace_directory(target, marker="card") as folder:
        write(folder, "new")
    assert (target / "card").read_text() == "old"


def test_leftovers_of_a_killed_writer_are_taken_over(target):
    previous, building = (target.with_name(f".export.{role}") for role in ("previous", "building"))
    for folder in (previous, building):
        folder.mkdir(parents=True)
        write(folder, "old")
    with pytest.raises(KeyError), replace_directory(target, marker="card"):
        raise KeyError
    assert (target / "card").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_directory_of_another_kind_is_not_replaced(target):
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="holds no card"), replace_directory(target, marker="card"):
        pytest.fail("the work must not begin")
    assert (target / "thesis.txt").read_text() == "precious"
