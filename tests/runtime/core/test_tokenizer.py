"""Test `runtime.core.tokenizer`: word ids of sentences."""

from __future__ import annotations

import logging
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.errors import ModelFileError, QueryError
from runtime.core.tokenizer import CONTRACTIONS, Vocabulary, _tokenizer, tokenize, word_table
from runtime.datasets.dataset import DataSet
from tests.raising import quotes, raises, records

WORDS = {"person": 1, "opens": 2, "the": 3, "door": 4, "'s": 5, ",": 6, "then": 7}


@pytest.mark.parametrize(
    ("sentence", "tokens"),
    [
        ("person opens the door.", ["person", "opens", "the", "door"]),
        ("the person's door", ["the", "person", "'s", "door"]),
        ("opens the door, then runs.", ["opens", "the", "door", ",", "then", "runs"]),
        ("  dog  runs   away .", ["dog", "runs", "away"]),
        ("person sits. dog sits.", ["person", "sits", "dog", "sits"]),
        ("they can't", ["they", "ca", "n't"]),
        ("e.g.this", ["egthis"]),
        (".", []),
        ("", []),
        (" \t\n", []),
    ],
)
def test_tokenize_matches_expected_tokens(sentence: str, tokens: list[str]) -> None:
    assert tokenize(sentence) == tokens


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_token_is_nonempty_without_space_or_full_stop(sentence: str) -> None:
    for token in tokenize(sentence):
        assert token
        assert "." not in token
        assert " " not in token


def test_ids_are_int32() -> None:
    ids = Vocabulary(WORDS).encode("the person's door")
    assert ids.dtype == np.int32
    assert ids.tolist() == [3, 1, 5, 4]


@pytest.mark.parametrize(("policy", "ids"), [("skip", [1, 4]), ("zero", [1, 0, 0, 4])])
def test_unknown_words_follow_policy_and_warn(policy: str, ids: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "drn"):
        assert Vocabulary(WORDS, policy).encode("person zorbs frimly door").tolist() == ids
    assert len(caplog.records) == len(records(caplog, logging.WARNING, "'zorbs', 'frimly'")) == 1
    Vocabulary(WORDS).encode("zorbs the zorbs")
    assert caplog.records[-1].getMessage().count("'zorbs'") == 1


def test_counted_unknown_words_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    vocabulary, unknown_words = Vocabulary(WORDS), Counter[str]()
    assert vocabulary.encode("the dirigible", unheard=unknown_words).tolist() == [3]
    assert unknown_words == {"dirigible": 1}
    for number in range(14):
        assert vocabulary.encode(f"person sings word{number}", unknown_words).tolist() == [1]
    assert not caplog.records
    vocabulary.tell(unknown_words)
    (record,) = caplog.records
    assert quotes(record.getMessage(), "'sings', 'dirigible', 'word0'", 6)
    vocabulary.tell(Counter())
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("vocabulary", "sentence", "code", "values"),
    [
        (Vocabulary(WORDS, "error"), "person zorbs", "unknown_words", ["'zorbs'"]),
        (
            Vocabulary(WORDS, "error"),
            "person opens the doar",
            "unknown_words",
            ["'doar'", "'door'", "runtime.grounding.words"],
        ),
        *[
            (Vocabulary(WORDS, policy), "zorbs frimly", "unknown_content_words", ["'zorbs frimly'"])
            for policy in ("skip", "zero", "error")
        ],
        (Vocabulary(WORDS), "the quixotically", "unknown_content_words", ["'person'", "'door'"]),
        *[(Vocabulary(WORDS), sentence, "no_words", [repr(sentence)]) for sentence in ("", "  ", "...", "\n")],
        (Vocabulary({}), "person", "missing_word_table", ["--vocabulary"]),
    ],
)
def test_unencodable_sentence_is_rejected(vocabulary: Vocabulary, sentence: str, code: str, values: list[str]) -> None:
    with raises(QueryError, code, *values):
        vocabulary.encode(sentence, check_content=sentence == "the quixotically")


@pytest.mark.parametrize("policy", ["skip", "zero"])
@pytest.mark.parametrize("sentence", ["the doar", "the doar then the doors", "The DOAR's", "the doar, then"])
def test_encode_unknown_content_words_suggests_near_words(policy: Any, sentence: str) -> None:
    with raises(QueryError, "unknown_content_words", "'door'", "runtime.grounding.words") as raised:
        Vocabulary(WORDS, policy).encode(sentence, check_content=True)
    assert "doar" in str(raised.value).lower()


@pytest.mark.parametrize("sentence", ["the", "then the", "the ?", "person zorbs", "Person", "the door of doar"])
def test_encode_known_content_or_none_is_accepted(sentence: str) -> None:
    vocabulary = Vocabulary(WORDS)
    ids = vocabulary.encode(sentence, check_content=True).tolist()
    assert ids == vocabulary.encode(sentence).tolist()


def test_word_lookup_prefers_original_case() -> None:
    words = {"Door": 1, "door": 2, "person": 3}
    assert Vocabulary(words).encode("Person DOOR Door door").tolist() == [3, 2, 1, 2]


@pytest.mark.parametrize("words", [{"a": 0}, {"a": 1, "b": 3}, {"a": 1, "b": 1}, {"a": 2}])
def test_invalid_word_ids_and_unknown_policies_are_rejected(words: dict[str, int]) -> None:
    with raises(ModelFileError, "word_numbers_not_consecutive", len(words)):
        Vocabulary(words)
    with raises(ModelFileError, "invalid_setting", "'guess'"):
        Vocabulary(WORDS, "guess")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["skip", "zero", "error"])
def test_vocabulary_survives_dict_conversion(policy: str) -> None:
    vocabulary = Vocabulary(WORDS, policy)
    assert Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    assert vocabulary != Vocabulary({**WORDS, "new": 8}, policy)
    assert len(vocabulary) == 7


def test_real_sentences_tokenize_and_67_differ_from_split(real_data: Path) -> None:
    data_set = DataSet(real_data / "charades_sta")
    assert len(data_set.vocabulary) == 1301
    lengths, differing = {}, {}
    for split in ("train", "test"):
        sentences = [annotation.sentence for annotation in data_set.annotations(split, "keep")]
        tokens = [tokenize(sentence) for sentence in sentences]
        for sentence in sentences:
            data_set.vocabulary.encode(sentence, check_content=True)
        assert all(token in data_set.words for row in tokens for token in row)
        lengths[split] = len(tokens), min(map(len, tokens)), max(map(len, tokens))
        differing[split] = sum(
            row != text.replace(".", "").split() for row, text in zip(tokens, sentences, strict=True)
        )
    assert lengths == {"train": (12408, 2, 12), "test": (3720, 2, 11)}
    assert differing == {"train": 54, "test": 13}


def test_word_table_is_lower_case_sorted_by_frequency() -> None:
    sentences = ["The cat sits.", "the dog, the cat", "A dog"]
    assert list(word_table(sentences).items()) == [
        ("the", 1), ("cat", 2), ("dog", 3), (",", 4), ("a", 5), ("sits", 6),
    ]  # fmt: skip
    assert word_table(sentences, min_count=2) == {"the": 1, "cat": 2, "dog": 3}
    assert word_table([]) == {}
    Vocabulary(word_table(sentences), "error").encode("The cat, a dog")


@given(
    st.lists(st.sampled_from([*sorted(CONTRACTIONS), "person", "Opens", "a", "3", "Cannot", "canNot", "gonnas", "x9"]))
)
def test_plain_sentences_match_reference_tokenizer(words: list[str]) -> None:
    for text in (" ".join(words), "  ".join(words) + " ", " " + ".".join(words)):
        assert tokenize(text) == _tokenizer().tokenize(text.replace(".", ""))


@given(st.text(string.ascii_letters + string.digits + " ", max_size=40))
def test_letters_and_digits_match_reference_tokenizer(text: str) -> None:
    assert tokenize(text) == _tokenizer().tokenize(text)
