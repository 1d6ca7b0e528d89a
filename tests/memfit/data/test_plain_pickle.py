"""Pickles of arrays, lists and text are read; nothing that is in one is run."""

import pickle
import pickletools

import numpy as np
import pytest

from memfit.data.plain_pickle import read_plain_pickle
from memfit.errors import DataError
from tests.memfit.data.hostile_pickle import Runs

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_arrays_lists_and_text_of_any_protocol(protocol):
    document = {
        "data": RANDOM.integers(0, 256, (3, 4), np.uint8),
        "labels": [1, 2, 300],
        b"names": [b"a", "b"],
        "more": (None, True, -5, 1.5, 2**40),
    }
    read = read_plain_pickle(pickle.dumps(document, protocol=protocol), "data")
    np.testing.assert_array_equal(read.pop("data"), document.pop("data"))
    assert read == document


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_hostile_pickle_runs_nothing(protocol, tmp_path):
    evidence = tmp_path / "evidence"
    for document in (Runs(evidence), {"data": Runs(evidence)}, [Runs(evidence)]):
        raw = pickle.dumps(document, protocol=protocol)
        with pytest.raises(DataError, match="Nothing of it was run"):
            read_plain_pickle(raw, "data")
    assert not evidence.exists()
    pickle.loads(raw)
    assert evidence.exists()  # it would have, had it been loaded


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x02}",
        b"no pickle",
        b"\x80\x02cos\nsystem\nU\x04true\x85R.",
        b"\x80\x02cnumpy\nndarray\n(U\x01aU\x01bu.",  # items for a class
        b"\x80\x02cnumpy\nndarray\n}b.",  # a state for a class
        b"\x80\x02]r\xff\xff\xff\xff.",  # a place in the memo for which others reserve 64 GB
        b"\x80\x02U\x01b" + b"\x86" * 3 + b".",
        b"\x80\x02}" + b"".join([b"K\x00q\x00"] + [b"h\x00h\x00\x86q\x00"] * 60) + b"K\x00s.",  # a key of 2^60 parts
        b"\x80\x02\x8a\xff",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02Qx.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",  # without a state
    ],
)
def test_malformed_pickles_are_refused_in_no_time(raw):
    try:
        assert read_plain_pickle(raw, "data") == []
    except DataError as error:
        assert "data: expected a" in str(error)  # noqa: PT017


def test_arrays_of_objects_and_of_other_sizes_are_refused():
    for array in (np.array([{}, []], object), np.zeros(3, np.float32), np.asfortranarray(np.zeros((2, 3), np.uint8))):
        with pytest.raises(DataError, match="expected a pickle of arrays"):
            read_plain_pickle(pickle.dumps({"data": array}, protocol=2), "data")


def test_only_known_instructions_are_interpreted():
    from memfit.data.plain_pickle import _Reader

    names = {opcode.name for opcode in pickletools.opcodes}
    own = {name for name in names if hasattr(_Reader, f"_{name.lower()}")}
    assert own <= {
        *("MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND"),
        *("APPENDS", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "BINGET", "LONG_BINGET"),
        *("GET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    }
