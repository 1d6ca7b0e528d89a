"""Small image data sets, and what reads them."""

import numpy as np

from memfit.data.image_spec import ImageSpec
from memfit.data.images import prepare_images
from memfit.data.prepared_images import PreparedImages


def spec_of(kind="npz", path=None, **changes):
    source_keys = ("image_size", "channels", "labels", "name")
    source = {"kind": kind, **({"path": str(path)} if path is not None else {})}
    source |= {key: changes.pop(key) for key in source_keys if key in changes}
    return ImageSpec.from_dict({"source": source, **changes})


def prepared(spec, store, **options):
    return PreparedImages(prepare_images(spec, store, code_version="1", **options))


def drawn(n, size=6, channels=3, classes=3, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (n, size, size, channels), np.uint8)
    return images, np.arange(n) % classes
