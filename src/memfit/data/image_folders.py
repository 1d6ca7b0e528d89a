"""Images in a directory of classes, `<class>/*.png`, or of splits, `train/<class>/*.png`; each file is checked."""

import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.image_spec import MAX_CLASSES, ImageSource
from memfit.data.raw_images import SPLIT_CODES, ImageFile, RawImages
from memfit.errors import DataError
from memfit.files import check_free_disk

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
UNREAD_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm", ".svg")
"""Images that are refused rather than left out of a class without a word."""
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Kinds of pixels that become unsigned bytes without a guess; 16-bit ones do not."""
MAX_PIXELS = 1 << 25
"""Most pixels of an image file: 33 megapixels take 100 MB as colors."""
MAX_IMAGE_BYTES = 1 << 27
"""Largest image file: 128 MiB."""
_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


def list_folder(root: Path) -> list[ImageFile]:
    """List the images below a directory, in order of their names. Raises DataError where there are none."""
    tops = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_split = bool(tops) and all(path.name in _FOLDERS for path in tops) and any(p.name == "train" for p in tops)
    pairs = [(path, _FOLDERS[path.name]) for path in tops] if by_split else [(root, "train")]
    files = []
    for parent, split in pairs:
        for folder in sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")):
            images = sorted(path for path in folder.iterdir() if _is_image(path, SUFFIXES))
            if unread := sorted(path for path in folder.iterdir() if _is_image(path, UNREAD_SUFFIXES)):
                kinds = ", ".join(SUFFIXES)
                raise DataError(f"{unread[0]}: expected images of {kinds}, got {len(unread)} others. Convert them")
            if not images:
                raise DataError(f"{folder}: expected images ({', '.join(SUFFIXES)}), got none. Remove it, or fill it")
            names = [str(path.relative_to(root)) for path in images]
            files += [
                ImageFile.found(path, name, label=folder.name, split=split, max_bytes=MAX_IMAGE_BYTES)
                for path, name in zip(images, names)
            ]
    if not files:
        raise DataError(f"{root}: expected <class>/<image> or train/<class>/<image>, got no images")
    return files


def _is_image(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def class_names(files: list[ImageFile]) -> list[str]:
    """Name the classes, in order. Raises DataError for too many, or for one that has no directory in train."""
    names = sorted({file.label for file in files})
    strange = sorted(set(names) - {file.label for file in files if file.split == "train"})
    if strange:
        raise DataError(f"class {strange[0]!r} is in validation or test but not in train; name classes alike")
    if len(names) > MAX_CLASSES:
        raise DataError(f"expected at most {MAX_CLASSES:,} classes, got {len(names):,}")
    return names


def read_folder(
    source: ImageSource, files: list[ImageFile], scratch: Path, report: Callable[[float], None]
) -> RawImages:
    """Decode all images into a file in `scratch`, memory-mapped; `report` is told the share done. Raises DataError."""
    names = class_names(files)
    shape = (len(files), source.image_size, source.image_size, source.channels)
    check_free_disk(scratch, 2 * int(np.prod(shape)), "preparing the images")
    images = np.lib.format.open_memmap(scratch / "decoded.npy", mode="w+", dtype=np.uint8, shape=shape)
    for place, file in enumerate(files):
        images[place] = _decode(file, source)
        file.check_unchanged()
        if place % 256 == 0:
            report(place / len(files))
    labels = np.array([names.index(file.label) for file in files], np.int64)
    splits = np.array([SPLIT_CODES[file.split] for file in files], np.int8)
    return RawImages(images, labels, splits, names)


def _decode(file: ImageFile, source: ImageSource) -> NDArray[np.uint8]:
    """Decode one file to [S, S, C]: turned upright, cut to a square around its center, resized, alpha dropped."""
    from PIL import Image, ImageOps  # a training process reads arrays alone

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(file.path, formats=FORMATS) as opened:
                _check_header(file.path, opened.size, opened.mode)
                upright: Any = ImageOps.exif_transpose(opened)
                plain = upright.convert("RGB" if source.channels == 3 else "L")
                size = (source.image_size, source.image_size)
                fitted = plain if plain.size == size else ImageOps.fit(plain, size, Image.Resampling.BILINEAR)
        return np.asarray(fitted, np.uint8).reshape(*size, source.channels)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{file.path}: {error!s:.200}; expected at most {MAX_PIXELS:,} pixels. Shrink it") from error
    except (OSError, ValueError, SyntaxError, EOFError, zlib.error, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file.path}: no whole image of {', '.join(FORMATS)}: {error!s:.200}. Remove it") from error


def _check_header(path: Path, size: tuple[int, int], mode: str) -> None:
    """Refuse an image by its header, before its pixels take memory."""
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"{path}: expected at most {MAX_PIXELS:,} pixels, got {size[0]} x {size[1]}. Shrink it")
    if mode not in MODES:
        raise DataError(f"{path}: expected 8 bits a channel, got pixels of kind {mode}. Convert it")
