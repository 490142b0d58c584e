"""Sentences become word ids, exactly as in the published code."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from runtime.core.errors import ModelFileError, QueryError, check_argument, excerpt

log = logging.getLogger("drn")

Unknown = Literal["skip", "zero", "error"]

# Unknown words that one warning names, of however many.
NAMED = 10

# Words of the vocabulary that an error offers in place of an unknown one, of so many unknown ones.
NEAR_WORDS, NEAR_OF = 3, 3
# Characters of an unknown word that known ones are compared with.
LONGEST_NEAR = 40
_STOP_TEXT = """
    a about after again all also an and another are around as at away back be been before being by can continues do does
    down each ends for from front has have he her him his how in into is it its itself more next of off on one onto or
    other others out over she several shown some starts still that the their them then there these they this three
    through to together two up very was we were what when where which while who with you
"""
# Words that name nothing to be seen: a query of which only these are known has no content.
STOP_WORDS = frozenset(_STOP_TEXT.split())

PLAIN = re.compile(r"[A-Za-z0-9 ]*")
# Words without an apostrophe that Treebank rules make two of.
CONTRACTIONS = frozenset(("cannot", "gimme", "gonna", "gotta", "lemme", "wanna"))


class Vocabulary:
    """The words a model knows, and what happens to those it does not.

    A word is looked up as written, then in lower case: the published tables are lower case and the published code
    looks up as written only, so a sentence they accept gets the same ids here.

    Args:
        words: word to id; ids are exactly 1..len(words), 0 is padding.
        unknown: `skip` leaves an unknown word out, `zero` keeps its place with the padding row (a zero
            embedding), `error` refuses the query. The first two warn and name the words.

    Raises:
        ModelFileError: the ids are not 1..len(words) or the policy is none of the three.
    """

    def __init__(self, words: Mapping[str, int], unknown: Unknown = "skip") -> None:
        if not isinstance(words, Mapping) or not all(
            isinstance(word, str) and isinstance(identity, int) and not isinstance(identity, bool)
            for word, identity in words.items()
        ):
            raise ModelFileError(
                f"A word table maps words to whole numbers, and {excerpt(words)} does not.", code="invalid_word_table"
            )
        if sorted(words.values()) != list(range(1, len(words) + 1)):
            raise ModelFileError(
                f"A word table maps {len(words)} words to the ids 1 to {len(words)}, each once, and this one does not.",
                code="word_numbers_not_consecutive",
            )
        if not isinstance(unknown, str) or unknown not in ("skip", "zero", "error"):
            raise ModelFileError(
                f"Unknown words are treated by skip, zero or error, and {excerpt(unknown)} was asked for.",
                code="invalid_setting",
            )
        self.words: dict[str, int] = dict(words)
        self.unknown: Unknown = unknown

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.words, self.unknown) == (other.words, other.unknown)

    __hash__ = None  # type: ignore[assignment]

    def encode(self, sentence: str, unheard: Counter[str] | None = None, check_content: bool = False) -> np.ndarray:
        """Return the (L,) int32 ids of a sentence, L at least 1.

        Args:
            sentence: what is asked.
            unheard: counts the unknown words, for callers that ask many sentences and name them once with `tell`; a
                warning names them when None.
            check_content: refuse sentences that have content words, but no known one. The published code accepts them,
                so sentences of data sets are not checked.

        Raises:
            QueryError: the sentence is empty, or one word is unknown under `error`, or no word is known, or no content
                word (code `unknown_content_words`).
        """
        tokens = tokenize(sentence)
        if not tokens:
            raise QueryError(
                f"The query {excerpt(sentence)} holds no word; write what happens in the video.", code="no_words"
            )
        if not self.words:
            raise QueryError(
                "This model carries no word table; convert its checkpoint again with --vocabulary word2id.json.",
                code="missing_word_table",
            )
        ids, unknown = [], []
        for token in tokens:
            identity = self.words.get(token) or self.words.get(token.lower())
            if identity is None:
                unknown.append(token)
                if self.unknown == "zero":
                    ids.append(0)
            else:
                ids.append(identity)
        if unknown:
            content = _content(unknown) if check_content else []
            if len(unknown) == len(tokens) or (content and len(content) == len(_content(tokens))):
                raise self._without_content(sentence, unknown)
            named = ", ".join(repr(word) for word in dict.fromkeys(unknown))
            if self.unknown == "error":
                raise QueryError(
                    f"The model does not know {named} in {excerpt(sentence)}; say it in words of its training set.",
                    code="unknown_words",
                )
            if unheard is not None:
                unheard.update(unknown)
            else:
                log.warning("The model does not know %s in %r; %s.", named, sentence, self._treated)
        return np.array(ids, np.int32)

    def knows_any(self, sentence: str) -> bool:
        """Return whether a word of a sentence is known. True without a word table."""
        return not self.words or any(
            self.words.get(token) or self.words.get(token.lower()) for token in tokenize(sentence)
        )

    def _without_content(self, sentence: str, unknown: Sequence[str]) -> QueryError:
        words = list(dict.fromkeys(_content(unknown) or unknown))
        near = dict.fromkeys(near for word in words[:NEAR_OF] for near in self.near(word))
        examples = list(near) or [word for word in self.words if word.isalpha() and word not in STOP_WORDS][:NEAR_WORDS]
        kind = "similar words of its training set are" if near else "words of its training set are, for example,"
        advice = f"{kind} {', '.join(map(repr, examples))}" if examples else "use words of its training set"
        if len(unknown) == len(tokenize(sentence)):
            problem = f"The model knows none of the words of {excerpt(sentence)}"
        else:
            named = ", ".join(excerpt(word) for word in words[:NAMED])
            problem = f"The model does not know {named} in {excerpt(sentence)}, and what is left has no content"
        return QueryError(f"{problem}; {advice}.", code="unknown_content_words")

    def near(self, word: str) -> list[str]:
        """Return the known words that are spelled most like `word`, at most three, the nearest first."""
        check_argument("word", word, str, "a text", QueryError)
        word = word.lower()[:LONGEST_NEAR]
        alike = [known for known in self.words if abs(len(known) - len(word)) <= 2 and known not in STOP_WORDS]
        return difflib.get_close_matches(word, alike, NEAR_WORDS, 0.6)

    def tell(self, unheard: Counter[str]) -> None:
        """Warn of the unknown words of many sentences, the commonest by name."""
        if unheard:
            named = ", ".join(repr(word) for word, _ in unheard.most_common(NAMED))
            more = f" and {len(unheard) - NAMED} others" if len(unheard) > NAMED else ""
            log.warning("The model does not know %s%s; %s.", named, more, self._treated)

    @property
    def _treated(self) -> str:
        return "left out" if self.unknown == "skip" else "given a zero embedding"

    def to_dict(self) -> dict[str, Any]:
        return {"unknown": self.unknown, "words": self.words}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Vocabulary:
        check_argument("value", value, Mapping, "what `to_dict` returns", ModelFileError)
        if missing := {"words", "unknown"} - value.keys():
            raise ModelFileError(
                f"A vocabulary lacks {' and '.join(sorted(missing))}; export the model again.", code="missing_field"
            )
        return cls(value["words"], value["unknown"])


def _content(tokens: Iterable[str]) -> list[str]:
    """Return the tokens that may name something to be seen: not stop words, punctuation or endings such as "'s"."""
    return [token for token in tokens if token[0].isalnum() and token.lower() not in STOP_WORDS]


def word_table(sentences: Iterable[str], least: int = 1) -> dict[str, int]:
    """Return word to id for the words that occur in `sentences` at least so often: lower case, commonest first."""
    counts = Counter(token.lower() for sentence in sentences for token in tokenize(sentence))
    retained = sorted(
        (word for word, count in counts.items() if count >= least), key=lambda word: (-counts[word], word)
    )
    return {word: identity for identity, word in enumerate(retained, 1)}


def tokenize(sentence: str) -> list[str]:
    """Return the tokens of a sentence: full stops deleted, then Treebank rules ("person's" is "person" and "'s").

    Source: the published code calls nltk.word_tokenize; without the sentence splitter, which needs data to be
    downloaded, the result is equal on all 16,128 Charades-STA sentences.
    """
    check_argument("sentence", sentence, str, "a text", QueryError)
    text = sentence.replace(".", "")
    # Nothing for the tokenizer's thirty patterns to find: they split at signs, and a few words.
    if PLAIN.fullmatch(text) and CONTRACTIONS.isdisjoint(text.lower().split()):
        return text.split()
    return _tokenizer().tokenize(text)


class _Tokenizer(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


@functools.cache
def _tokenizer() -> _Tokenizer:
    # Imported late: nltk takes longer to import than a query to answer.
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()
