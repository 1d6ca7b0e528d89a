"""Corpora: splits that share no text, tokens that give every document back, memory that does not grow with a source."""

import gzip
import itertools
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from memfit.data.corpus import corpus_fingerprint, outline_corpus, prepare_corpus
from memfit.data.corpus_spec import CorpusSpec
from memfit.data.corpus_splits import DROPPED, TEST, TRAIN, VALIDATION, HeldOut, assign_splits
from memfit.data.near_duplicates import digest, normalized, sampling, shared_share, shingles
from memfit.data.prepared_corpus import PreparedCorpus
from memfit.data.splits import SPLITS
from memfit.data.tokenizer import outline_tokenizer, train_tokenizer
from memfit.errors import DataError

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


def drawn_texts(count, num_words=40, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, num_words)) + f" – text {index}.\n" for index in range(count)]


@pytest.fixture
def write(tmp_path):
    """Write texts as JSON lines."""

    def write(texts, name="texts.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return tmp_path / name

    return write


def spec_of(*paths, **changes):
    source = {"paths": [str(path) for path in paths]} if paths else {"kind": "sample"}
    tokenizer = {"vocab_size": 320, **changes.pop("tokenizer", {})}
    shares = {"validation_share": 0.1, "test_share": 0.1}
    return CorpusSpec.from_dict({"source": source, "tokenizer": tokenizer, **shares, **changes})


def prepared(spec, store, **options):
    return PreparedCorpus(prepare_corpus(spec, store, code_version="1", **options))


def texts_of(corpus, split):
    """Decode every document of a split."""
    tokenizer, tokens, ends = corpus.tokenizer(), corpus.tokens(split), corpus.documents(split)
    return [tokenizer.decode(tokens[start + 1 : stop].tolist()) for start, stop in itertools.pairwise(ends)]


# Preparation


def test_splits_hold_every_document_once_as_it_was(write, tmp_path):
    texts = [*drawn_texts(60), "  <|endoftext|> 😀\x00\r\n "]
    corpus = prepared(spec_of(write(texts)), tmp_path / "store")
    found = {split: texts_of(corpus, split) for split in SPLITS}
    assert {split: len(found[split]) for split in SPLITS} == {"train": 49, "validation": 6, "test": 6}
    assert sorted(text for split in SPLITS for text in found[split]) == sorted(texts)
    for split in SPLITS:
        assert corpus.manifest["num_documents"][split] == len(found[split])
        assert corpus.document_bytes(split).tolist() == [len(text.encode()) for text in found[split]]
        assert corpus.manifest["num_bytes"][split] == corpus.document_bytes(split).sum()


def test_documents_stand_between_ends_of_text(write, tmp_path):
    corpus = prepared(spec_of(write(drawn_texts(60))), tmp_path / "store")
    assert (corpus.vocab_size, corpus.eot) == (320, 319)
    for split in SPLITS:
        tokens = corpus.tokens(split)
        assert tokens.dtype == np.uint16
        assert isinstance(tokens, np.memmap)
        np.testing.assert_array_equal(np.flatnonzero(tokens == corpus.eot), corpus.documents(split))
        assert (corpus.documents(split)[0], corpus.documents(split)[-1]) == (0, len(tokens) - 1)
        assert corpus.token_bytes[tokens].sum() == corpus.manifest["num_bytes"][split]
    assert corpus.manifest["byte_exact"]


def test_the_splits_follow_seed_and_text_not_the_order_of_the_source(write, tmp_path):
    texts = drawn_texts(60)
    plain = prepared(spec_of(write(texts)), tmp_path / "store")
    reversed_, other = (
        prepared(spec_of(write(texts[::-1], "b.jsonl")), tmp_path / "store"),
        prepared(spec_of(write(texts), seed=-1), tmp_path / "store"),
    )
    for split in SPLITS:
        assert sorted(texts_of(plain, split)) == sorted(texts_of(reversed_, split))
    assert set(texts_of(plain, "test")) != set(texts_of(other, "test"))


def test_copies_that_differ_in_blanks_and_case_are_dropped_and_counted(write, tmp_path):
    texts = drawn_texts(60)
    copies = [text.upper().replace(" ", "\n ") for text in texts[:20]] + texts[:5]
    corpus = prepared(spec_of(write(texts + copies), near_duplicates=0), tmp_path / "store")
    assert corpus.manifest["duplicates"] == {"exact": 25, "dropped_from_train": 0, "dropped_from_validation": 0}
    assert sorted(text for split in SPLITS for text in texts_of(corpus, split)) == sorted(texts)


def changed(text, every):
    """Replace some words of a text, with as much of its runs of eight words."""
    return " ".join(f"x{place}" if place % every == every - 1 else word for place, word in enumerate(text.split()))


def test_no_document_has_a_near_copy_in_another_split(write, tmp_path):
    texts = drawn_texts(60, num_words=100)
    copies, others = ([changed(text, every) for text in texts] for every in (40, 8))
    corpus = prepared(spec_of(write([*texts, *copies, *others])), tmp_path / "store")
    kept = {text: split for split in SPLITS for text in texts_of(corpus, split)}
    assert all(len({kept[text] for text in pair if text in kept}) == 1 for pair in zip(texts, copies, strict=True))
    assert kept.keys() >= set(others)
    dropped = corpus.manifest["duplicates"]
    assert dropped["dropped_from_train"] > 0
    assert dropped["dropped_from_train"] + dropped["dropped_from_validation"] == 180 - len(kept)


def test_the_tokenizer_is_trained_on_train_documents_alone(write, tmp_path):
    corpus = prepared(spec_of(write(drawn_texts(60))), tmp_path / "store")
    trained = train_tokenizer(texts_of(corpus, "train"), 320, "<|endoftext|>")
    assert json.loads(trained.to_str()) == json.loads(corpus.tokenizer_path.read_text(encoding="utf-8"))


def test_two_preparations_give_the_same_bytes(write, tmp_path):
    path = write(drawn_texts(60))
    first, second = (prepared(spec_of(path), tmp_path / store) for store in "ab")
    assert first.manifest == second.manifest
    assert first.tokenizer_path.read_bytes() == second.tokenizer_path.read_bytes()


def test_the_tokenizer_sees_a_sample_of_so_many_bytes(write, tmp_path, monkeypatch):
    seen = []

    def train(texts, vocab_size, end_of_text):
        seen.extend(texts)
        return outline_tokenizer(vocab_size, end_of_text)

    monkeypatch.setattr("memfit.data.corpus.train_tokenizer", train)
    corpus = prepared(spec_of(write(drawn_texts(200)), tokenizer={"train_bytes": 5000}), tmp_path / "store")
    assert 2500 < sum(len(text.encode()) for text in seen) <= 5000
    whole = texts_of(corpus, "train")
    places = [next(place for place, text in enumerate(whole) if text.startswith(piece)) for piece in seen]
    assert places == sorted(places)
    assert places[-1] > len(whole) // 2  # they are not the first ones


def test_documents_may_be_left_out_by_length_and_number(write, tmp_path):
    texts = ["", " \n ", "short", *drawn_texts(60)]
    corpus = prepared(spec_of(write(texts), min_chars=10, max_documents=40), tmp_path / "store")
    assert corpus.manifest["num_too_short"] == 3
    assert sorted(text for split in SPLITS for text in texts_of(corpus, split)) == sorted(texts[3:43])


def test_a_given_tokenizer_is_taken_as_it_is(write, tmp_path):
    path = write(drawn_texts(60))
    first = prepared(spec_of(path), tmp_path / "store")
    again = prepared(spec_of(path, tokenizer={"path": str(first.path)}), tmp_path / "store")
    assert again.path != first.path
    assert again.tokenizer_path.read_bytes() == first.tokenizer_path.read_bytes()
    assert again.manifest["tokenizer_sha256"] == first.manifest["tokenizer_sha256"]
    np.testing.assert_array_equal(again.tokens("train"), first.tokens("train"))
    with pytest.raises(DataError, match="the tokenizer has no token '</s>'"):
        prepared(spec_of(path, tokenizer={"path": str(first.path)}, end_of_text="</s>"), tmp_path / "store")


def test_the_packaged_sample_is_prepared(tmp_path):
    corpus = prepared(spec_of(tokenizer={"vocab_size": 1000}), tmp_path / "store")
    assert sum(corpus.manifest["num_documents"].values()) > 70
    assert any("lambda" in text for text in texts_of(corpus, "train"))


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "holds 0 different documents; expected at least 9, 3 for each split.* set source.separator"),
        (["a"] * 20, {}, "holds 1 different documents"),
        (drawn_texts(12), {"test_share": 0.8}, "train has 0 documents.* lower validation_share or test_share"),
        (
            [f"{drawn_texts(1)[0]} {index}" for index in range(20)],
            {"near_duplicates": 0.5},
            "has 0 documents; expected at least 3; the others are near copies .*raise near_duplicates",
        ),
        (drawn_texts(20), {"tokenizer": {"vocab_size": 60_000}}, "the train documents give .* expected 60000"),
    ],
)
def test_corpora_that_are_too_small_are_refused(write, tmp_path, texts, changes, message):
    with pytest.raises(DataError, match=message):
        prepared(spec_of(write(texts), **changes), tmp_path / "store")
    assert not [path for path in (tmp_path / "store").iterdir() if path.suffix != ".lock"]


# Splits and copies


def test_the_lowest_digests_are_held_out():
    digests = np.array([50, 10, 20, 10, 90, 80, 70, 60, 40, 30, 20, 100], np.uint64)
    spec = spec_of(validation_share=0.3, test_share=0.3)
    expected = {TEST: [10, 20, 30], VALIDATION: [40, 50, 60], TRAIN: [70, 80, 90, 100], DROPPED: [10, 20]}
    splits = assign_splits(digests, spec)
    assert {code: sorted(digests[splits == code].tolist()) for code in expected} == expected
    assert splits[:4].tolist() == [VALIDATION, TEST, TEST, DROPPED]


def test_shingles_are_runs_of_eight_words():
    words = [f"w{index}" for index in range(20)]
    whole = shingles(normalized(" ".join(words)))
    assert len(whole) == len(set(whole.tolist())) == 13
    np.testing.assert_array_equal(shingles(normalized("\n".join(words[3:12]).upper())), whole[3:5])
    assert len(shingles(normalized(" ".join(words[:7])))) == 0
    assert not set(whole.tolist()) & set(shingles(normalized(" ".join(words[::-1]))).tolist())


def test_a_sample_of_shingles_estimates_what_is_shared():
    texts = drawn_texts(40, num_words=4000)
    others = np.unique(np.concatenate([shingles(normalized(text), 8) for text in texts[:20]]))
    kept = [shingles(normalized(text), 8) for text in texts[20:]]
    assert np.mean([len(some) for some in kept]) == pytest.approx(500, rel=0.05)
    assert max(shared_share(some, others) for some in kept) < 0.05
    half = shingles(normalized(texts[0][:10_000] + texts[30][10_000:]), 8)
    assert shared_share(half, others) == pytest.approx(10_000 / len(texts[0]), abs=0.1)


def test_larger_corpora_keep_fewer_shingles():
    assert [sampling(1 << power) for power in (0, 20, 21, 25, 26, 27, 33)] == [1, 1, 8, 8, 8, 16, 1024]


def test_validation_documents_are_compared_with_test_ones_only():
    texts = drawn_texts(4)
    splits = np.array([TEST, VALIDATION, VALIDATION, TRAIN], np.int8)
    everything = [texts[0], texts[0] + " b", texts[1], texts[1] + " c"]
    held_out = HeldOut.read(everything, splits, 1)
    assert held_out.drop_copies(everything, splits, 0.5) == {VALIDATION: 1, TRAIN: 1}
    assert splits.tolist() == [TEST, DROPPED, VALIDATION, DROPPED]


def test_digests_depend_on_seed_and_text():
    found = [digest(normalized(text), seed) for text, seed in [("A  b", 0), ("a b\n", 0), ("a b", 1), ("ab", 0)]]
    assert found[0] == found[1]
    assert len(set(found)) == 3


# The store


def test_a_corpus_is_prepared_once_and_anew_where_it_is_torn(write, tmp_path):
    spec, phases = spec_of(write(drawn_texts(60))), []
    directory = prepare_corpus(spec, tmp_path / "store", code_version="1")
    assert directory.name == corpus_fingerprint(spec, "1")
    before = (directory / "train.npy").stat().st_mtime_ns
    prepare_corpus(spec, tmp_path / "store", code_version="1", on_progress=lambda *told: phases.append(told))
    assert phases == [("hash", 0.0), ("done", 1.0)]
    content = bytearray((directory / "train.npy").read_bytes())
    content[-3] ^= 1
    (directory / "train.npy").write_bytes(content)
    phases.clear()
    prepare_corpus(spec, tmp_path / "store", code_version="1", on_progress=lambda *told: phases.append(told))
    assert list(dict.fromkeys(phase for phase, _ in phases)) == ["hash", "read", "compare", "learn", "write", "done"]
    assert [share for _, share in phases] == sorted(share for _, share in phases)
    assert (directory / "train.npy").stat().st_mtime_ns > before
    assert (directory / "train.npy").read_bytes() != bytes(content)


def test_the_name_tells_bytes_and_settings_not_places(write, tmp_path):
    path = write(drawn_texts(20))
    name = corpus_fingerprint(spec_of(path), "1")
    (tmp_path / "moved").mkdir()
    assert corpus_fingerprint(spec_of(shutil.copy(path, tmp_path / "moved")), "1") == name
    assert corpus_fingerprint(spec_of(path), "2") != name
    assert corpus_fingerprint(spec_of(path, seed=1), "1") != name
    assert corpus_fingerprint(spec_of(write(drawn_texts(21))), "1") != name


@pytest.mark.parametrize("name", ["train.npy", "test_documents.npy", "token_bytes.npy", "manifest.json"])
def test_a_directory_that_is_not_whole_is_refused(write, tmp_path, name):
    corpus = prepared(spec_of(write(drawn_texts(20))), tmp_path / "store")
    if name.endswith("npy"):
        np.save(corpus.path / name, np.load(corpus.path / name)[:-1])
    else:
        (corpus.path / name).write_text("{}")
    with pytest.raises(DataError, match=r"is no whole prepared corpus: .*Prepare it again"):
        PreparedCorpus(corpus.path)


def test_a_corpus_travels_as_its_path(write, tmp_path):
    corpus = pickle.loads(pickle.dumps(prepared(spec_of(write(drawn_texts(20))), tmp_path / "store")))
    assert len(corpus.tokens("train")) == corpus.manifest["num_tokens"]["train"]
    with pytest.raises(DataError, match="unknown split 'dev'"):
        corpus.tokens("dev")


@pytest.mark.parametrize("given", [False, True])
def test_an_outline_has_the_form_of_what_is_prepared(write, tmp_path, given):
    spec = spec_of(write(drawn_texts(60)))
    corpus = prepared(spec, tmp_path / "store")
    if given:
        spec = spec_of(write(drawn_texts(60)), tokenizer={"path": str(corpus.tokenizer_path)})
    outline_corpus(spec, tmp_path / "outline", min_tokens=1000)
    outline = PreparedCorpus(tmp_path / "outline")
    assert outline.manifest.keys() | {"source"} == corpus.manifest.keys()
    assert (outline.vocab_size, outline.eot) == (corpus.vocab_size, corpus.eot)
    assert outline.tokenizer().token_to_id("<|endoftext|>") == corpus.eot
    for split in SPLITS:
        assert len(outline.tokens(split)) >= 1000
        assert outline.tokens(split).max() == outline.eot
        assert (outline.tokens(split) == outline.eot).sum() == len(outline.documents(split))
    with pytest.raises(DataError, match="no such file"):
        outline_corpus(spec_of(tmp_path / "none.jsonl"), tmp_path / "other", min_tokens=1000)


# Memory and processes

PREPARE_WITH_LITTLE = """
import sys
from pathlib import Path
from memfit.data import tokenizer
from memfit.data.corpus import prepare_corpus
from memfit.data.corpus_spec import CorpusSpec
tokenizer.BATCH_CHARS = 1 << 16
assert "tokenizers" not in sys.modules and "torch" not in sys.modules
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = held()
settings = {"vocab_size": 300, "train_bytes": 10**5}
spec = CorpusSpec.from_dict({"source": {"paths": [sys.argv[1]]}, "tokenizer": settings})
prepare_corpus(spec, Path(sys.argv[2]), code_version="1")
print(held() - before)
"""


def test_memory_does_not_grow_with_the_source(tmp_path):
    path, page = tmp_path / "a.jsonl.gz", "<p>" * 20_000
    with gzip.open(path, "wt", compresslevel=1) as opened:  # 60 MiB
        opened.writelines(json.dumps({"page": page, "text": text}) + "\n" for text in drawn_texts(1000, num_words=200))
    command = [sys.executable, "-c", PREPARE_WITH_LITTLE, str(path), str(tmp_path / "store")]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert float(run.stdout) < 40
    assert run.stderr == ""
