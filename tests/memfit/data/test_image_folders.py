"""Images in directories of classes and of splits, and files that are none."""

import numpy as np
import pytest
from PIL import Image

from memfit.errors import DataError
from tests.memfit.data.image_sets import prepared, spec_of


def test_a_folder_of_classes_becomes_squares(folder, tmp_path):
    root = folder()
    (root / ".hidden").mkdir()
    (root / "cat" / "notes.txt").write_text("no image")
    data = prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    assert data.manifest["class_names"] == ["cat", "dog"]
    assert data.manifest["image_size"] == [8, 8]
    batch = data.batch("test", np.arange(data.num_images("test")))
    assert np.array_equal(batch["image"].mean(axis=(1, 2)).argmax(axis=1), 2 * batch["label"])
    assert data.manifest["source"]["files"] == 40
    assert not (data.path / "decoded.npy").exists()


def test_splits_of_a_folder_are_kept(folder, tmp_path):
    data = prepared(spec_of("folder", folder("train", "val", "test"), image_size=10, channels=1), tmp_path / "store")
    assert data.manifest["splits_of_the_source"] == ["validation", "test"]
    assert [data.num_images(split) for split in ("train", "validation", "test")] == [40, 40, 40]
    assert data.manifest["channels"] == 1


def test_images_of_the_right_size_are_taken_as_they_are(folder, tmp_path):
    root = folder(size=(8, 8))
    data = prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    first = np.asarray(Image.open(root / "cat" / "00.png"))
    np.testing.assert_array_equal(data.images[np.flatnonzero(data.origins == 0)[0]], first)


@pytest.mark.parametrize("name", ["a.gif", "b.TIFF"])
def test_an_image_of_another_kind_is_refused_and_not_left_out(folder, tmp_path, name):
    root = folder(size=(8, 8))
    (root / "cat" / name).write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=f"{name}: expected images of .png.*Convert them"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")


def test_an_image_that_is_turned_by_its_metadata_is_turned(folder, tmp_path):
    root = folder(size=(8, 8))
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(root / "cat" / "00.png", exif=exif)
    data = prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    turned = data.images[np.flatnonzero(data.origins == 0)[0]]
    assert (turned[:4].max(), turned[4:].min()) == (0, 255)


def test_a_decompression_bomb_is_refused_by_its_header(folder, tmp_path, monkeypatch):
    root = folder()
    Image.new("L", (6000, 6000)).save(root / "dog" / "bomb.png")
    with pytest.raises(DataError, match=r"bomb.png: expected at most 33,554,432 pixels, got 6000 x 6000"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)
    with pytest.raises(DataError, match=r"bomb.png: .*decompression bomb"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")


def test_what_is_no_image_is_refused(folder, tmp_path):
    root = folder()
    spoiled = root / "cat" / "05.png"
    for content in (b"", b"GIF89a no", spoiled.read_bytes()[:100]):
        spoiled.write_bytes(content)
        with pytest.raises(DataError, match=r"05.png: no whole image"):
            prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(spoiled)
    with pytest.raises(DataError, match="expected 8 bits a channel"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")


def test_folders_without_images_or_with_new_classes_are_refused(folder, tmp_path):
    root = folder("train", "test")
    (root / "test" / "bird").mkdir()
    with pytest.raises(DataError, match="bird: expected images"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    Image.new("RGB", (8, 8)).save(root / "test" / "bird" / "0.png")
    with pytest.raises(DataError, match="class 'bird' is in validation or test but not in train"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="got no images"):
        prepared(spec_of("folder", tmp_path / "empty", image_size=8), tmp_path / "store")
