"""Tokenizers: nothing is lost, bytes add up, the end of text is no text; tokenizers of others are taken as they are."""

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from memfit.data import tokenizer as module
from memfit.data.tokenizer import (
    DocumentTokenizer,
    find_tokenizer,
    load_tokenizer,
    outline_tokenizer,
    train_tokenizer,
)
from memfit.errors import DataError

EOT = "<|endoftext|>"
TEXTS = [
    "the cat sat on the mat, the dog ate the cat's hat. " * 3,
    "Über den Wolken 12 345\n\n  def f(x):\n\treturn x\n" * 3,
]
HARD = [
    "",
    " ",
    "\r\n \t\x00\x01\x7f\x85\xa0\u2028",
    "emoji 😀👩‍👩‍👧 flags 🇩🇪 combining e\u0301 \ufeff",
    f"before {EOT} after {EOT}{EOT}",
    "漢字かな交じり文 العربية עברית",
    "\U0010ffff\ufffd\ue000",
    "x" * 3000 + " " * 3000,
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 300, EOT)


def encoded(tokenizer, texts, end_of_text=EOT):
    return list(DocumentTokenizer(tokenizer, end_of_text).encode(enumerate(texts)))


def test_every_text_comes_back_and_its_bytes_add_up(trained):
    generator = random.Random(0)
    texts = HARD + [
        "".join(
            chr(generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)]))
            for _ in range(60)
        )
        for _ in range(20)
    ]
    sizes = DocumentTokenizer(trained, EOT).token_bytes
    for (index, tokens, num_bytes), text in zip(encoded(trained, texts), texts, strict=True):
        assert texts[index] == text
        assert trained.decode(tokens.tolist(), skip_special_tokens=False) == text
        assert sizes[tokens].sum() == num_bytes == len(text.encode())


def test_the_same_texts_give_the_same_tokenizer_whatever_their_order():
    trained = [train_tokenizer(texts, 300, EOT).to_str() for texts in (TEXTS, TEXTS, TEXTS[::-1])]
    assert trained[0] == trained[1] == trained[2]


def test_the_end_of_text_is_the_last_token_and_comes_from_no_text(trained):
    documents = DocumentTokenizer(trained, EOT)
    assert (documents.eot, documents.vocab_size, documents.dtype) == (299, 300, np.uint16)
    assert documents.token_bytes[299] == 0
    assert (documents.token_bytes[:299] > 0).all()
    [(_, tokens, _)] = encoded(trained, [EOT])
    assert 299 not in tokens


def test_a_saved_tokenizer_gives_the_same_tokens(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(find_tokenizer(str(tmp_path)))
    for (_, tokens, _), (_, again, _) in zip(encoded(trained, HARD), encoded(loaded, HARD), strict=True):
        np.testing.assert_array_equal(tokens, again)


def test_long_documents_are_encoded_in_pieces_to_the_same_tokens(trained, monkeypatch):
    text = "  ".join(TEXTS * 3) + "x" * 200 + " y"
    [(_, whole, _)] = encoded(trained, [text])
    monkeypatch.setattr(module, "BATCH_CHARS", 300)
    monkeypatch.setattr(module, "PIECE_CHARS", 100)
    found = encoded(trained, ["a", text[: text.index("xxx")], "", text])
    assert [number for number, _, _ in found] == [0, 1, 2, 3]
    np.testing.assert_array_equal(found[1][1], whole[: len(found[1][1])])
    assert trained.decode(found[3][1].tolist()) == text
    assert len(found[2][1]) == 0


def test_endless_words_do_not_hold_the_training_up():
    words = ["acgt" * 50_000, " " * 200_000, "ab" * 300]
    trained = train_tokenizer([*words, *TEXTS], 300, EOT)
    for (_, tokens, _), word in zip(encoded(trained, words), words, strict=True):
        assert trained.decode(tokens.tolist()) == word


def test_texts_that_give_too_few_tokens_are_refused():
    with pytest.raises(DataError, match="the train documents give 265 tokens, end of text included; expected 1000"):
        train_tokenizer(["aabb ccdd " * 3], 1000, EOT)
    with pytest.raises(DataError, match="end_of_text: 'cat' is a token of the documents' own"):
        train_tokenizer(["cat dog " * 20], 262, "cat")


def test_an_error_among_the_texts_is_passed_on():
    def texts():
        yield TEXTS[0]
        raise DataError("changed")

    with pytest.raises(DataError, match="changed"):
        train_tokenizer(texts(), 300, EOT)


def other_tokenizer(path, *, byte_level=True, special="</s>"):
    """Save a tokenizer as others are: with a normalizer, a template, truncation, padding and dropout."""
    tokenizer = Tokenizer(models.BPE(dropout=0.5) if byte_level else models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    alphabet = []
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    names = [special, "<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(0 if byte_level else 256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("Wolken", normalized=False)])
    end = (special, tokenizer.token_to_id(special))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{special} $A {special}", special_tokens=[end])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50, pad_token="<pad>")
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if "0x" not in token["content"]]
    path.write_text(json.dumps(document))
    return path


def test_a_tokenizer_of_others_adds_nothing_and_cuts_nothing(tmp_path):
    loaded = load_tokenizer(other_tokenizer(tmp_path / "tokenizer.json"))
    documents = DocumentTokenizer(loaded, "</s>")
    assert documents.eot == 0
    texts = [*TEXTS, "a </s> b"]
    for (_, tokens, num_bytes), (_, again, _), text in zip(
        encoded(loaded, texts, "</s>"), encoded(loaded, texts, "</s>"), texts, strict=True
    ):
        np.testing.assert_array_equal(tokens, again)
        assert loaded.decode(tokens.tolist(), skip_special_tokens=False) == text
        assert documents.token_bytes[tokens].sum() == num_bytes
    [(_, tokens, num_bytes)] = encoded(loaded, ["e\u0301"], "</s>")  # the normalizer makes two bytes of three
    assert documents.token_bytes[tokens].sum() == 2
    assert num_bytes == 3


def test_bytes_of_a_tokenizer_with_marked_blanks_are_told_by_its_marks(tmp_path):
    loaded = load_tokenizer(other_tokenizer(tmp_path / "tokenizer.json", byte_level=False))
    documents = DocumentTokenizer(loaded, "</s>")
    [(_, tokens, num_bytes)] = encoded(loaded, ["the cat 😀"], "</s>")
    assert documents.token_bytes[tokens].sum() == num_bytes + 1  # a blank is put before the text


def test_an_end_of_text_must_be_a_token_that_no_text_gives(tmp_path):
    loaded = load_tokenizer(other_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"no token '<s>' \(did you mean '</s>'\?\); its special tokens are </s>, <pad>"
    ):
        DocumentTokenizer(loaded, "<s>")
    with pytest.raises(DataError, match="the tokenizer makes 'Wolken' out of ordinary text"):
        encoded(loaded, TEXTS, "Wolken")


def test_files_that_are_no_tokenizer_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no such file; expected a tokenizer\.json"):
        find_tokenizer(str(tmp_path))
    for content in (b"", b"{}", b"\xff", b'{"model": {}}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError, match=r"no tokenizer\.json of the library tokenizers"):
            load_tokenizer(find_tokenizer(str(tmp_path)))
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 3)
    with pytest.raises(DataError, match="expected at most 0 MiB"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("vocab_size", [257, 300, 70_000])
def test_an_outline_has_as_many_tokens(vocab_size):
    documents = DocumentTokenizer(outline_tokenizer(vocab_size, EOT), EOT)
    assert (documents.vocab_size, documents.eot) == (vocab_size, vocab_size - 1)
    assert documents.dtype == (np.uint32 if vocab_size > 65536 else np.uint16)
