"""From labeled images to the prepared directory: splits without shared images, normalization, arrays, a manifest."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.arrays import ArrayWriter, write_array
from memfit.data.image_sources import hash_file, list_files, outline_source, read_images
from memfit.data.image_spec import ImageSpec
from memfit.data.raw_images import SPLIT_CODES, ImageFile, RawImages
from memfit.data.splits import SPLITS
from memfit.data.store import built, describe_sources, write_manifest
from memfit.errors import DataError
from memfit.files import fingerprint

SCHEMA = 1
BYTES_PER_PIECE = 1 << 24
"""How many bytes of images are copied at once."""
OUTLINE_IMAGES = 64
"""Fewest made-up images of a split in an outline."""
DROPPED = -1

Progress = Callable[[str, float], None]


def images_fingerprint(spec: ImageSpec, code_version: str) -> str:
    """Return the name of the prepared directory, from the spec, the source's bytes and the code version.

    Where the files lie does not matter, only their names and bytes. Raises DataError for missing files.
    """
    files = list_files(spec.source)
    return _fingerprint(spec, _hashed(files), code_version)


def _hashed(files: Sequence[ImageFile]) -> dict[str, Any]:
    return describe_sources((hash_file(file), file.name, file.num_bytes) for file in files)


def _fingerprint(spec: ImageSpec, source: dict[str, Any], code_version: str) -> str:
    document = spec.to_dict()
    document["source"].pop("path", None)
    return fingerprint({"schema": SCHEMA, "images": document, "source": source, "code_version": code_version})


def prepare_images(
    spec: ImageSpec,
    store: Path,
    *,
    code_version: str,
    fresh: bool = False,
    on_progress: Callable[[str, float], None] | None = None,
) -> Path:
    """Write `store/<fingerprint>/` and return it; one that is there and whole is used again.

    A directory that differs from its manifest is built anew, and so is every one with `fresh`. `on_progress` is told
    the phase ("hash", "read", "write", "done") and the share of the work that is done. Raises DataError where the
    source will not do.
    """
    report = on_progress or (lambda _phase, _share: None)
    report("hash", 0.0)
    files = list_files(spec.source)
    source = _hashed(files)
    name = _fingerprint(spec, source, code_version)

    def build(empty: Path) -> dict[str, Any]:
        report("read", 0.1)
        raw = read_images(spec.source, files, empty, lambda share: report("read", 0.1 + 0.6 * share))
        manifest = _write(spec, raw, empty, report)
        (empty / "decoded.npy").unlink(missing_ok=True)
        return {"schema": SCHEMA, "code_version": code_version, "source": source, **manifest}

    directory = built(store, name, build, fresh=fresh)
    report("done", 1.0)
    return directory


def outline_images(spec: ImageSpec, directory: Path) -> None:
    """Write a few made-up images of the source's shape, some of every class, before its images are read."""
    outline = outline_source(spec.source)
    count = max(2, -(-OUTLINE_IMAGES // len(outline.class_names)))
    labels = np.tile(np.arange(len(outline.class_names)), count * len(SPLITS))
    splits = np.repeat(np.arange(len(SPLITS), dtype=np.int8), len(labels) // len(SPLITS))
    low, high = outline.value_range
    drawn = np.random.default_rng(0).integers(low, high + 1, (len(labels), *outline.shape), np.uint8)
    directory.mkdir(parents=True)
    raw = RawImages(drawn, labels, splits, outline.class_names, outline.value_range)
    arrays = _write_arrays(raw, splits, _digests(raw.images), directory, lambda _phase, _share: None)
    described = _describe(spec, raw, splits, dict.fromkeys(("train", "validation"), 0), 0, arrays)
    write_manifest(directory, {"schema": SCHEMA, "fingerprint": "outline", "code_version": "", **described})


def _write(spec: ImageSpec, raw: RawImages, directory: Path, report: Progress) -> dict[str, Any]:
    if len(raw.class_names) < 2:
        raise DataError(f"expected two classes or more, got {raw.class_names}")
    digests = _digests(raw.images)
    splits = choose_splits(spec, raw, digests)
    dropped = drop_shared(splits, digests)
    _check_filled(raw, splits)
    arrays = _write_arrays(raw, splits, digests, directory, report)
    left = digests[splits == SPLIT_CODES["train"]]
    return _describe(spec, raw, splits, dropped, len(left) - len(np.unique(left)), arrays)


def _digests(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return 8 bytes of BLAKE2b of every image's pixels, uint64 [N]: the same image, the same digest."""
    found = bytearray()
    for image in images:
        found += hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest()
    return np.frombuffer(bytes(found), "<u8").astype(np.uint64)


def choose_splits(spec: ImageSpec, raw: RawImages, digests: NDArray[np.uint64]) -> NDArray[np.int8]:
    """Return the split code of every image, int8 [N]: the source's own splits, the missing ones drawn by class.

    Images are drawn in the order of a hash of seed and pixels: that neither the order of the source nor numpy's
    generators change, and that keeps copies of one image together. Raises DataError for a class that is too small.
    """
    splits = raw.splits.copy()
    missing = [split for split in ("test", "validation") if not (splits == SPLIT_CODES[split]).any()]
    keys = _keys(digests, spec.seed)
    shares = {"test": spec.test_share, "validation": spec.validation_share}
    for label, name in enumerate(raw.class_names):
        rows = np.flatnonzero((raw.labels == label) & (raw.splits == SPLIT_CODES["train"]))
        if len(rows) <= len(missing):
            raise DataError(
                f"class {name!r} has {len(rows)} images to train on; expected at least {len(missing) + 1}. Add some, "
                "or leave the class out"
            )
        rows = rows[np.lexsort((rows, keys[rows]))]
        for place, split in enumerate(missing):
            most = len(rows) - (len(missing) - place)  # one is left for every split that follows, and for train
            count = min(max(1, round(len(rows) * shares[split])), most)
            splits[rows[:count]] = SPLIT_CODES[split]
            rows = rows[count:]
    return splits


def _keys(digests: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    salt = seed.to_bytes(8, "little", signed=True)
    found = b"".join(hashlib.blake2b(digest.tobytes() + salt, digest_size=8).digest() for digest in digests)
    return np.frombuffer(found, "<u8").astype(np.uint64)


def drop_shared(splits: NDArray[np.int8], digests: NDArray[np.uint64]) -> dict[str, int]:
    """Mark, in place, train images that are in validation or test too, and validation images that are in test.

    Returns how many were dropped from each. Labels do not matter: the same pixels are the same image.
    """
    dropped = {}
    for split, others in (("validation", ["test"]), ("train", ["validation", "test"])):
        taken = digests[np.isin(splits, [SPLIT_CODES[other] for other in others])]
        shared = (splits == SPLIT_CODES[split]) & np.isin(digests, taken)
        splits[shared] = DROPPED
        dropped[split] = int(shared.sum())
    return {"train": dropped["train"], "validation": dropped["validation"]}


def _check_filled(raw: RawImages, splits: NDArray[np.int8]) -> None:
    for label, name in enumerate(raw.class_names):
        if not ((raw.labels == label) & (splits == SPLIT_CODES["train"])).any():
            raise DataError(
                f"class {name!r} has no image left to train on: all are in validation or test too. Remove the copies"
            )
    for split in ("validation", "test"):
        if not (splits == SPLIT_CODES[split]).any():
            raise DataError(f"{split} has no image left: all are in test too. Remove the copies, or its directory")


def _write_arrays(
    raw: RawImages, splits: NDArray[np.int8], digests: NDArray[np.uint64], directory: Path, report: Progress
) -> dict[str, list[float]]:
    """Write the images by split, in the source's order within each; return mean and std of the train pixels."""
    order = np.concatenate([np.flatnonzero(splits == SPLIT_CODES[split]) for split in SPLITS])
    num_train = int((splits == SPLIT_CODES["train"]).sum())
    rows = max(1, BYTES_PER_PIECE // raw.images[0].size)
    sums = _Sums(raw.images.shape[-1])
    with ArrayWriter(directory / "images.npy", np.uint8, (len(order), *raw.images.shape[1:])) as writer:
        for start in range(0, len(order), rows):
            piece = raw.images[order[start : start + rows]]
            writer.write(piece)
            sums.add(piece[: max(0, num_train - start)])
            report("write", 0.7 + 0.3 * start / len(order))
    write_array(directory / "labels.npy", raw.labels[order].astype(np.int64))
    write_array(directory / "digests.npy", digests[order])
    write_array(directory / "origins.npy", order.astype(np.int64))
    return {"mean": sums.mean, "std": sums.std}


class _Sums:
    """Sums of pixels by channel in whole numbers: exact, however the images are cut into pieces."""

    def __init__(self, channels: int) -> None:
        self.count, self.first, self.second = 0, [0] * channels, [0] * channels

    def add(self, images: NDArray[np.uint8]) -> None:
        """Add images [n, H, W, C]."""
        values = np.arange(256, dtype=np.int64)
        for channel in range(images.shape[-1]):
            counts = np.bincount(images[..., channel].reshape(-1), minlength=256)
            self.first[channel] += int((counts * values).sum())
            self.second[channel] += int((counts * values**2).sum())
        self.count += images[..., 0].size

    @property
    def mean(self) -> list[float]:
        return [total / self.count for total in self.first]

    @property
    def std(self) -> list[float]:
        """Return the population's; 1 for a channel that does not vary."""
        spreads = [self.count * square - total**2 for total, square in zip(self.first, self.second)]
        return [spread**0.5 / self.count if spread else 1.0 for spread in spreads]


def _describe(
    spec: ImageSpec,
    raw: RawImages,
    splits: NDArray[np.int8],
    dropped: dict[str, int],
    repeated: int,
    normalization: dict[str, list[float]],
) -> dict[str, Any]:
    borders, counts, start = {}, {}, 0
    for split in SPLITS:
        labels = raw.labels[splits == SPLIT_CODES[split]]
        borders[split] = {"start": start, "stop": start + len(labels)}
        counts[split] = np.bincount(labels, minlength=len(raw.class_names)).tolist()
        start += len(labels)
    own = [split for split in ("validation", "test") if (raw.splits == SPLIT_CODES[split]).any()]
    return {
        "workload": "vision",
        "kind": spec.source.kind,
        "num_images": start,
        "image_size": list(raw.images.shape[1:3]),
        "channels": raw.images.shape[3],
        "value_range": list(raw.value_range),
        "class_names": raw.class_names,
        "num_classes": len(raw.class_names),
        "class_counts": counts,
        "borders": borders,
        "splits_of_the_source": own,
        "split_seed": spec.seed,
        "duplicates": {
            "dropped_from_train": dropped["train"],
            "dropped_from_validation": dropped["validation"],
            "repeated_within_train": repeated,
        },
        "normalization": normalization,
    }
