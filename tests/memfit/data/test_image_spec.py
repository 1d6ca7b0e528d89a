"""What may be said of an image data set."""

import pytest

from memfit.data.image_spec import ImageSpec
from memfit.errors import ConfigError
from tests.memfit.data.image_sets import spec_of


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"source": {"kind": "mnist"}}, "source.kind: expected one of cifar10"),
        ({"source": {"kind": "npz"}}, "source.path: expected a path"),
        ({"source": {"kind": "sample", "path": "x"}}, "source.path: expected none"),
        ({"source": {"kind": "folder", "path": "x"}}, "source.image_size: expected 1 to 2048 pixels, got 0"),
        ({"source": {"kind": "npz", "path": "x"}, "validation_share": 0}, "validation_share: expected a share"),
        ({"source": {"kind": "npz", "path": "x"}, "sede": 1}, r"sede is no setting \(did you mean 'seed'\?\)"),
        ({"source": {"kind": "cifar100", "path": "x", "labels": "both"}}, 'source.labels: expected "fine"'),
        (["source"], "data: expected a table"),
    ],
)
def test_refuses_settings_that_cannot_work(document, message):
    with pytest.raises(ConfigError, match=message):
        ImageSpec.from_dict(document)


def test_a_spec_is_its_document():
    spec = spec_of("cifar100", "x.tar.gz", labels="coarse", seed=3)
    assert ImageSpec.from_dict(spec.to_dict()) == spec
