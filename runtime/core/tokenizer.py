"""Convert sentences to word ids, exactly as the published code does."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from runtime.core.errors import ModelFileError, QueryError, check_argument, excerpt, invalid_setting

log = logging.getLogger("drn")

Unknown = Literal["skip", "zero", "error"]

# Maximum number of unknown words in a message.
MAX_NAMED = 10
# Maximum number of similar words for each unknown word, and of unknown words for which similar ones are searched.
MAX_SIMILAR, MAX_SEARCHED = 3, 3
# Maximum number of characters of an unknown word that are compared.
MAX_COMPARED_LENGTH = 40
_STOP_TEXT = """
    a about after again all also an and another are around as at away back be been before being by can continues do does
    down each ends for from front has have he her him his how in into is it its itself more next of off on one onto or
    other others out over she several shown some starts still that the their them then there these they this three
    through to together two up very was we were what when where which while who with you
"""
# Words that describe nothing visible. A query whose other words are all unknown is rejected.
STOP_WORDS = frozenset(_STOP_TEXT.split())

PLAIN = re.compile(r"[A-Za-z0-9 ]*")
# Words without an apostrophe that Treebank rules split.
CONTRACTIONS = frozenset(("cannot", "gimme", "gonna", "gotta", "lemme", "wanna"))


class Vocabulary:
    """The word table of a model, and the policy for unknown words.

    A word is looked up as written, then in lower case. The published code looks up as written only, in lower-case
    tables, so sentences that it accepts get the same ids.

    Args:
        words: word to id; ids are 1 to len(words), and 0 is padding.
        unknown: `skip` removes unknown words, `zero` replaces them by padding (a zero embedding), both with a warning;
            `error` rejects the query.

    Raises:
        ModelFileError: the ids are not 1 to len(words), or the policy is none of the three.
    """

    def __init__(self, words: Mapping[str, int], unknown: Unknown = "skip") -> None:
        if not isinstance(words, Mapping) or not all(
            isinstance(word, str) and isinstance(identity, int) and not isinstance(identity, bool)
            for word, identity in words.items()
        ):
            raise ModelFileError(
                f"Expected a word table of words to integers, got {excerpt(words)}. Correct the word table.",
                code="invalid_word_table",
            )
        if sorted(words.values()) != list(range(1, len(words) + 1)):
            raise ModelFileError(
                f"Expected the ids 1 to {len(words)}, each once, in a table of {len(words)} words, got "
                f"{excerpt(sorted(words.values()))}. Correct the word table.",
                code="word_numbers_not_consecutive",
            )
        if not isinstance(unknown, str) or unknown not in ("skip", "zero", "error"):
            raise invalid_setting("skip, zero or error for unknown words", unknown, "correct the policy")
        self.words: dict[str, int] = dict(words)
        self.unknown: Unknown = unknown

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.words, self.unknown) == (other.words, other.unknown)

    __hash__ = None  # type: ignore[assignment]

    def encode(
        self,
        sentence: str,
        unknown_words: Counter[str] | None = None,
        check_content: bool = False,
        unheard: Counter[str] | None = None,
    ) -> np.ndarray:
        """Return the (L,) int32 ids of a sentence, L at least 1.

        Args:
            unknown_words: counter to which unknown words are added, for callers that warn once with `tell`; with None,
                a warning names them.
            check_content: reject sentences with content words of which none is known. The published code accepts
                them, so sentences of data sets are not checked.
            unheard: deprecated name of `unknown_words`.

        Raises:
            QueryError: the sentence is empty, or one word is unknown under `error`, or no word is known, or no content
                word (code `unknown_content_words`).
        """
        tokens = tokenize(sentence)
        if not tokens:
            raise QueryError(
                f"Expected a sentence, got {excerpt(sentence)}. Describe what happens in the video.", code="no_words"
            )
        self._check_table()
        ids, unknown = [], []
        for token in tokens:
            identity = self._id(token)
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
                    f"The model does not know {named} in {excerpt(sentence)}. {self._advice(unknown)}",
                    code="unknown_words",
                )
            counter = unheard if unknown_words is None else unknown_words
            if counter is not None:
                counter.update(unknown)
            else:
                log.warning("The model does not know %s in %r. %s", named, sentence, self._treatment)
        return np.array(ids, np.int32)

    def knows_any(self, sentence: str) -> bool:
        """Return whether at least one word of a sentence is known, or the model has no word table."""
        return not self.words or any(map(self._id, tokenize(sentence)))

    def knows_all(self, sentence: str) -> bool:
        """Return whether all words of a sentence are known, and there is at least one."""
        tokens = tokenize(sentence)
        return bool(tokens) and all(map(self._id, tokens))

    def _id(self, token: str) -> int | None:
        return self.words.get(token) or self.words.get(token.lower())

    def _without_content(self, sentence: str, unknown: Sequence[str]) -> QueryError:
        words = list(dict.fromkeys(_content(unknown) or unknown))
        if len(unknown) == len(tokenize(sentence)):
            problem = f"The model knows no word of {excerpt(sentence)}"
        else:
            named = ", ".join(map(excerpt, words[:MAX_NAMED]))
            problem = f"The model does not know {named}, the content of {excerpt(sentence)}"
        return QueryError(f"{problem}. {self._advice(words)}", code="unknown_content_words")

    def _advice(self, unknown: Sequence[str]) -> str:
        """Return a sentence that suggests words in place of unknown ones, and the command that lists all."""
        searched = list(dict.fromkeys(unknown))[:MAX_SEARCHED]
        similar = list(dict.fromkeys(known for word in searched for known in self.near(word)))
        examples = similar or [word for word in self.words if word.isalpha() and word not in STOP_WORDS][:MAX_SIMILAR]
        advice = "Use similar words of its training set" if similar else "Use words of its training set"
        if examples:
            advice += f", such as {', '.join(map(repr, examples))}"
        return f"{advice}; `python -m runtime.grounding.words MODEL` lists all."

    def _check_table(self) -> None:
        if not self.words:
            raise QueryError(
                "The model has no word table. Convert its checkpoint again with --vocabulary word2id.json.",
                code="missing_word_table",
            )

    def starting_with(self, prefix: str) -> list[str]:
        """Return the known words that start with a prefix in upper or lower case, sorted; all words for ''.

        Raises:
            QueryError: the model has no word table.
        """
        self._check_table()
        prefix = prefix.lower()
        return sorted(word for word in self.words if word.lower().startswith(prefix))

    def near(self, word: str) -> list[str]:
        """Return at most three known words of similar spelling, most similar first."""
        check_argument("word", word, str, "a text", QueryError)
        word = word.lower()[:MAX_COMPARED_LENGTH]
        candidates = [known for known in self.words if abs(len(known) - len(word)) <= 2 and known not in STOP_WORDS]
        return difflib.get_close_matches(word, candidates, MAX_SIMILAR, 0.6)

    def tell(self, unheard: Counter[str]) -> None:
        """Warn about the unknown words of many sentences, and name the most common ones."""
        if unheard:
            named = ", ".join(repr(word) for word, _ in unheard.most_common(MAX_NAMED))
            more = f" and {len(unheard) - MAX_NAMED} others" if len(unheard) > MAX_NAMED else ""
            log.warning("The model does not know %s%s. %s", named, more, self._treatment)

    @property
    def _treatment(self) -> str:
        return "They are removed." if self.unknown == "skip" else "They get a zero embedding."

    def to_dict(self) -> dict[str, Any]:
        return {"unknown": self.unknown, "words": self.words}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Vocabulary:
        """Return the vocabulary in the result of `to_dict`; ModelFileError for other values."""
        check_argument("value", value, Mapping, "the result of `to_dict`", ModelFileError)
        if missing := {"words", "unknown"} - value.keys():
            raise ModelFileError(
                f"The vocabulary lacks {' and '.join(sorted(missing))}. Export the model again.", code="missing_field"
            )
        return cls(value["words"], value["unknown"])


def _content(tokens: Iterable[str]) -> list[str]:
    """Return the content words: no stop words, punctuation or endings such as "'s"."""
    return [token for token in tokens if token[0].isalnum() and token.lower() not in STOP_WORDS]


def word_table(sentences: Iterable[str], min_count: int = 1) -> dict[str, int]:
    """Return word to id, from 1, for the words of sentences in lower case, most common first."""
    counts = Counter(token.lower() for sentence in sentences for token in tokenize(sentence))
    retained = sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )
    return {word: identity for identity, word in enumerate(retained, 1)}


def tokenize(sentence: str) -> list[str]:
    """Return the tokens of a sentence: full stops removed, then Treebank rules ("person's" is "person" and "'s").

    Source: the published code calls nltk.word_tokenize. This function omits its sentence splitter, which needs a
    download; the result is equal for all 16,128 Charades-STA sentences.
    """
    check_argument("sentence", sentence, str, "a text", QueryError)
    text = sentence.replace(".", "")
    # Treebank rules split at punctuation and in contractions only.
    if PLAIN.fullmatch(text) and CONTRACTIONS.isdisjoint(text.lower().split()):
        return text.split()
    return _tokenizer().tokenize(text)


@functools.cache
def _tokenizer() -> Any:
    # Importing nltk takes longer than answering a query. Importing a module of it imports all of nltk.
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()
