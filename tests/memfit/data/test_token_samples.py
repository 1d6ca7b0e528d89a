"""Every token of a split is predicted once, and nothing is predicted from a later one."""

from dataclasses import dataclass

import numpy as np
import pytest

from memfit.data.token_samples import IGNORED, TokenSamples

EOT = 9


@dataclass
class Corpus:
    """Documents as a prepared corpus holds them, in memory."""

    lengths: tuple[int, ...]
    eot: int = EOT

    def __post_init__(self):
        self._ends = np.concatenate([[0], np.cumsum([length + 1 for length in self.lengths])])
        self._tokens = np.random.default_rng(0).integers(0, EOT, int(self._ends[-1]) + 1).astype(np.uint16)
        self._tokens[self._ends] = EOT

    def tokens(self, split):
        return self._tokens

    def documents(self, split):
        return self._ends


def cut(corpus, seq_len, packing):
    samples = TokenSamples(corpus, seq_len, packing)
    return samples, *samples.cut("train", np.arange(samples.num_samples("train")))


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize("lengths", [(5,), (1, 7, 3), (4, 4), (20, 1, 1)])
@pytest.mark.parametrize("seq_len", [2, 4, 64])
def test_every_token_is_predicted_once_from_the_one_before_it(lengths, seq_len, packing):
    corpus = Corpus(lengths)
    _, inputs, targets = cut(corpus, seq_len, packing)
    real = targets != IGNORED
    assert targets.shape == inputs.shape == (len(inputs), seq_len)
    np.testing.assert_array_equal(targets[real], corpus.tokens("train")[1:])
    np.testing.assert_array_equal(inputs[real], corpus.tokens("train")[:-1])
    assert (inputs[~real] == EOT).all()


def test_no_sample_of_documents_holds_two():
    samples, inputs, targets = cut(Corpus((5, 3, 9)), 4, "document")
    assert samples.num_samples("train") == 2 + 1 + 3
    starts = inputs[:, 0] == EOT
    assert starts.tolist() == [True, False, True, True, False, False]
    inside = inputs[:, 1:][targets[:, 1:] != IGNORED]
    assert (inside != EOT).all()  # an end of text is an input only where a document begins


def test_the_stream_pads_its_last_sample_alone():
    samples, _, targets = cut(Corpus((5, 3, 9)), 4, "stream")
    assert samples.num_samples("train") == 5
    assert (targets[:-1] != IGNORED).all()


def test_spans_say_where_samples_lie():
    corpus = Corpus((5, 3, 9))
    samples = TokenSamples(corpus, 4, "document")
    first, lengths = samples.spans("train", np.array([5, 0, 2]))
    assert first.tolist() == [18, 0, 6]
    assert lengths.tolist() == [2, 4, 4]


def test_large_tokens_do_not_wrap_around():
    corpus = Corpus((3,))
    corpus._tokens[1] = 65_535
    _, inputs, targets = cut(corpus, 4, "stream")
    assert inputs[0, 1] == targets[0, 0] == 65_535
