"""Titles that an explanation names without ground: known titles that are beside the point, and invented ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from raypipe.metrics.text import Vocabulary

_QUOTED = re.compile(r'"([^"\n]+)"|“([^”\n]+)”')
_YEAR = re.compile(r" \((?:1[89]|20)\d\d\)")
_INTRODUCED = re.compile(r"\b(?:such as|like)\s+", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[,;:!?()\"“”\n]|\.(?:\s|$)|$")
_WORD = re.compile(r"\S+")
_OPENING, _CLOSING = "\"“'‘([*_", '"”'

_ARTICLES = frozenset(["The", "A", "An", "Le", "La", "Les", "Il", "El", "Los", "Las", "Der", "Die", "Das"])
# These words may be in lower case within a title.
_SMALL = frozenset(
    [
        *("a", "an", "the", "and", "&", "or", "of", "in", "on", "to", "for", "at", "by", "with", "from"),
        *("de", "la", "le", "du", "des", "et", "der", "die", "und", "van", "von"),
    ]
)
_LINKS = frozenset(["and", "or", "&"])
# Words that may follow a title. Other words show that the phrase is no title: "American" in "American comedies".
_AFTER = frozenset(["but", "because", "which", "that", "is", "are", "was", "were", "as", "since", "so", "while"])

_MARK = re.compile(r" \[[^\]]*\]$")  # as `distinct_titles` appends it
_LAST_YEAR = re.compile(rf"{_YEAR.pattern}$")
_ASIDE = re.compile(r" \([^)]*\)")


@dataclass(frozen=True)
class Unfounded:
    """`unchosen`, catalogue titles that are beside the point, and `made_up`, titles that no item has."""

    unchosen: tuple[str, ...]
    made_up: tuple[str, ...]


class Titles:
    """The titles of a catalogue, and the `values` of its attributes, which are not titles. Compiled once."""

    def __init__(self, titles: Collection[str], values: Iterable[str]) -> None:
        self._titles, self._values = Vocabulary(titles), Vocabulary(values)
        self._spellings = Vocabulary(chain.from_iterable(map(_spellings, titles)))

    def unfounded(self, text: str, history_titles: Collection[str], item_title: str) -> Unfounded:
        """What an explanation names other than the user's history and the recommended item.

        Three things are taken for titles: text in double quotes; capitalised words before a year in parentheses; and
        capitalised words directly after "such as" or "like", up to the next comma or the end of the sentence. They are
        made up if no item has such a title and they are no attribute value. A title of the catalogue is recognised in
        other forms too: without its year, without what follows its colon, without its words in parentheses, with its
        article in front, or with another year after it.

        Not covered: made-up titles in other places. Persons and places after "like", words quoted for another reason,
        and words before a year that are capitalised for another reason count as titles. Titles that are everyday words
        count as named wherever the word stands in the title's spelling ("Speed" at the start of a sentence).
        """
        founded = {*history_titles, item_title}
        known = [(start, start + len(spelling)) for start, spelling in self._spellings.found(text)]
        made_up = chain(self._quoted(text), self._dated(text, known), self._introduced(text, known))
        return Unfounded(
            tuple(title for title in self._titles.named(text) if title not in founded), tuple(dict.fromkeys(made_up))
        )

    def _quoted(self, text: str) -> Iterator[str]:
        for straight, curly in _QUOTED.findall(text):
            piece = (straight or curly).strip()
            forms = {piece, piece.rstrip(".,;:!?")}
            if piece and not forms & self._spellings.values and not forms & self._values.values:
                yield piece

    def _dated(self, text: str, known: list[tuple[int, int]]) -> Iterator[str]:
        """Capitalised words before a year, unless the year belongs to a known title or directly follows one."""
        for year in _YEAR.finditer(text):
            if any(start < year.start() <= end for start, end in known):
                continue
            name = _name_before(text[: year.start()])
            if name and name[_article(name) :] not in self._values.values:
                yield name + year[0]

    def _introduced(self, text: str, known: list[tuple[int, int]]) -> Iterator[str]:
        """Capitalised words after "such as" or "like". `_dated` yields those before a year."""
        for found in _INTRODUCED.finditer(text):
            if any(start <= found.start() < end for start, end in known):
                continue
            for start, end in _names_behind(text, found.end()):
                name = text[start:end]
                is_known = any(at <= start + _article(name) and end <= to for at, to in known)
                if not is_known and not self._values.named(name):
                    yield name


def _spellings(title: str) -> set[str]:
    """The title, and shorter forms of it that people write."""
    whole = _MARK.sub("", title).strip()
    year = _LAST_YEAR.search(whole)
    name = whole[: year.start()] if year else whole
    names = {name, _ASIDE.sub("", name)}
    names |= {one.partition(":")[0] for one in names}
    for one in list(names):
        rest, comma, article = one.rpartition(", ")
        if comma and article in _ARTICLES:
            names |= {rest, f"{article} {rest}"}
    return {title, whole, *names, *(f"{one}{year[0]}" for one in names if year)}


def _name_before(text: str) -> str:
    """The capitalised words at the end of a text, with small words between them; "" if there are none."""
    words: list[str] = []
    for written in reversed(text.rpartition("\n")[2].split()):
        word = written.lstrip(_OPENING)
        if not (_is_capitalised(word) or word in _SMALL) or word[-1] in _CLOSING:
            break
        if words and (word[-1] in ".!?;" or (word[-1] == "," and not (len(words) == 1 and words[0] in _ARTICLES))):
            break
        words.insert(0, word)
        if word != written:
            break
    while words and words[0] in _SMALL:
        del words[0]
    return " ".join(words)


def _names_behind(text: str, start: int) -> Iterator[tuple[int, int]]:
    """The spans of the names with which a clause begins, joined by "and" or "or".

    A last name is left out if a year or a noun continues it.
    """
    end = _CLAUSE_END.search(text, start).start()  # type: ignore[union-attr]  # the end of the text matches too
    names: list[list[tuple[int, int]]] = [[]]
    goes_on = any(_YEAR.match(text, at) for at in (end - 1, end + 1))
    for word in _WORD.finditer(text, start, end):
        if word[0] in _LINKS:
            names.append([])
        elif _is_capitalised(word[0]) or word[0] in _SMALL:
            # A small word may be within a name, but not before it.
            if names[-1] or word[0] not in _SMALL:
                names[-1].append(word.span())
        else:
            goes_on = word[0] not in _AFTER
            break
    for number, words in enumerate(names):
        while words and text[slice(*words[-1])] in _SMALL:
            del words[-1]
        if words and not (goes_on and number == len(names) - 1) and text[words[0][0] : words[-1][1]] != "I":
            yield words[0][0], words[-1][1]


def _article(name: str) -> int:
    """The characters of the article that a name begins with and of the space after it; 0 without an article."""
    first, space, _ = name.partition(" ")
    return len(first) + 1 if space and first in _ARTICLES else 0


def _is_capitalised(word: str) -> bool:
    return word[:1].isupper() or word[:1].isdigit()
