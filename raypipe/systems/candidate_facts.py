"""Facts about a candidate from counts and texts, as whole numbers from 0 to 9 in the candidate's line of a prompt.

A small language model cannot know which items are popular or chosen together; these numbers state it:

    chosen   how often anybody chose it
    again    how often this user chose it
    near     how near it is to what is chosen together with items similar to the user's; two numbers
    alike    how similar its text is to the texts of the user's items; two numbers
    linked   how many paths of two co-occurrence steps lead to it from the user's items
    after    its share of what came within ten places after these items; two numbers

Of two numbers, the first is for the user's last item and the second for all their items, but `after` for the last five.
0 means nothing at all. `again` is the count itself, at most 9. Every other number is the quantile among the values that
random items have, with finer steps at the top, so that a longer log does not shift the numbers. All counts come from
the histories given to `Facts.of`, which end before the event that is asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array, diags_array, vstack

from raypipe.errors import UsageError
from raypipe.recommenders.floors import Transitions
from raypipe.recommenders.windows import Histories

FORM = "chosen {} again {} near {} {} alike {} {} linked {} after {} {}"
NAMES = ("chosen", "again", "near last", "near", "alike last", "alike", "linked", "after last", "after")
_PLACES = (0.25, 0.5, 0.7, 0.82, 0.9, 0.95, 0.98, 0.993)
_NEIGHBOURS = 20  # items of similar text, the item itself included, over which `near` is smoothed
_FILE = "facts.safetensors"
_MATRICES = ("together", "followed", "vectors", "neighbours")
_PARTS = ("data", "indices", "indptr")
_TERMS = 50_000
_RECENT = 5  # last items whose followers count
_AT_ONCE = 512
_SAMPLE = 128  # random histories, each with as many random items, from which the grades' edges are taken


@dataclass(frozen=True)
class Facts:
    """The counts and texts from which facts are computed.

    `popularity` [items + 1] and `together` [items + 1, items + 1] are counts of some histories, and so are the shares
    `followed` [items + 1, items + 1]: of what came after a column's item, those of the rows' items. `vectors`
    [items + 1, terms] are the items' text vectors, of length 1. `neighbours` [items + 1, items + 1] weights, for each
    item, the items of similar text; its rows sum to 1. Of a user, the last `history` events are used.
    """

    popularity: NDArray[np.float32]
    together: csr_array
    followed: csr_array
    vectors: csr_array
    neighbours: csr_array
    history: int
    edges: tuple[NDArray[np.float64], ...] = ()
    """Of each fact the values that part its numbers."""

    @classmethod
    def of(cls, base: Histories, vectors: csr_array, neighbours: csr_array, history: int) -> Facts:
        items = vectors.shape[0] - 1
        popularity = np.log1p(base.counts(items)).astype(np.float32)
        together = _normalised(chosen_together(base, items))
        facts = cls(popularity, together, _shares(Transitions(base, items)), vectors, neighbours, history)
        return replace(facts, edges=facts._graded_at())

    def save(self, folder: Path) -> None:
        """Write the facts to `folder`, that of a model trained with these counts."""
        arrays: dict[str, NDArray[Any]] = {"popularity": self.popularity, "history": np.array([self.history])}
        for name in _MATRICES:
            matrix = getattr(self, name)
            arrays |= {f"{name}/{part}": np.asarray(getattr(matrix, part)) for part in (*_PARTS, "shape")}
        save_file(arrays | {f"edges/{number}": mine for number, mine in enumerate(self.edges)}, folder / _FILE)

    @classmethod
    def load(cls, folder: Path, items: int) -> Facts:
        """Read facts for a catalogue of `items` items; items added since the facts were saved have none (all zeros).

        Raises UsageError if they were saved with other numbers, which a ranker would take for these.
        """
        told = load_file(folder / _FILE)
        if f"edges/{len(NAMES) - 1}" not in told or any(f"{name}/shape" not in told for name in _MATRICES):
            raise UsageError(
                f"The ranker in {folder} knows candidates by numbers of another version.",
                "Train it again with `raypipe align --system trsr`.",
            )
        popularity = np.zeros(items + 1, np.float32)
        popularity[: len(told["popularity"])] = told["popularity"]
        matrices = {}
        for name in _MATRICES:
            parts = tuple(told[f"{name}/{part}"] for part in _PARTS)
            matrix = csr_array(parts, shape=tuple(told[f"{name}/shape"].tolist()))
            matrix.resize(items + 1, matrix.shape[1] if name == "vectors" else items + 1)
            matrices[name] = matrix
        edges = tuple(told[f"edges/{number}"] for number in range(len(NAMES)))
        return cls(popularity, **matrices, history=int(told["history"][0]), edges=edges)

    def graded(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.int64]:
        """Grades 0 to 9, int64 [n, k, facts], of the items int32 [n, k] after each prefix."""
        values = self.values(prefixes, candidates)
        found = np.zeros(values.shape, np.int64)
        for fact, edges in enumerate(self.edges):
            mine = values[:, :, fact]
            found[:, :, fact] = np.where(mine > 0, 1 + np.searchsorted(edges, mine, side="right"), 0)
        found[:, :, NAMES.index("again")] = np.minimum(values[:, :, NAMES.index("again")], 9)
        return found

    def told(self, prefixes: Histories, candidates: NDArray[np.int32]) -> Iterator[list[str]]:
        """Yield, for each prefix, the text with the numbers of each of its candidates."""
        for start in range(0, len(candidates), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            some = prefixes.take(prefixes.starts[part], prefixes.lengths[part])
            for grades in self.graded(some, candidates[part]).tolist():
                yield [FORM.format(*mine) for mine in grades]

    def values(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        """Ungraded values, float32 [n, k, facts], of the items int32 [n, k] after each prefix."""
        kept = np.minimum(prefixes.lengths, self.history)
        parts = [np.zeros((0, candidates.shape[1], len(NAMES)), np.float32)]
        for start in range(0, len(candidates), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            parts.append(self._values(prefixes.take((prefixes.ends - kept)[part], kept[part]), candidates[part]))
        return np.concatenate(parts)

    def _values(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        rows = np.broadcast_to(np.arange(len(candidates))[:, None], candidates.shape)
        last, recent, whole = (chosen_by(prefixes, self.vectors.shape[0], window) for window in (1, _RECENT, None))
        lengths = np.maximum(prefixes.lengths, 1)[:, None]
        found = [
            self.popularity[candidates],
            whole[rows, candidates].toarray(),
            *(_products(mine @ self.neighbours @ self.together, self.neighbours, candidates) for mine in (last, whole)),
            _products(last @ self.vectors, self.vectors, candidates),
            _products(whole @ self.vectors, self.vectors, candidates) / lengths,
            _products(whole @ self.together, self.together, candidates),  # which is symmetric
            *(_products(mine, self.followed, candidates) for mine in (last, recent)),
        ]
        return np.stack(found, 2).astype(np.float32)

    def _graded_at(self) -> tuple[NDArray[np.float64], ...]:
        """For each fact, the values that separate its grades: quantiles over random items after random histories."""
        rng = np.random.default_rng(0)
        items = len(self.popularity) - 1
        known = np.flatnonzero(self.popularity[1:]) + 1
        if not len(known):
            return (np.zeros(0),) * len(NAMES)
        drawn = rng.choice(known, _SAMPLE * 4).astype(np.int32)
        after = Histories(drawn, np.arange(1, _SAMPLE + 1) * 4)
        values = self.values(after, rng.integers(1, items + 1, (_SAMPLE, _SAMPLE)).astype(np.int32))
        positive = (values[:, :, fact][values[:, :, fact] > 0] for fact in range(len(NAMES)))
        return tuple(np.quantile(mine, _PLACES) if len(mine) else np.zeros(0) for mine in positive)


def _products(left: csr_array, right: csr_array, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
    """Dot products float32 [n, k] of each row of `left` [n, m] with its candidates' rows of `right` [items + 1, m].

    `candidates` int32 [n, k] are item indices; no other products are computed.
    """
    found = np.zeros(candidates.shape, np.float32)
    for row, mine in enumerate(candidates):
        found[row] = right[mine] @ left[[row]].toarray()[0].astype(np.float64)
    return found


def chosen_by(histories: Histories, width: int, window: int | None = None) -> csr_array:
    """Count each item among the last `window` events (all events if None) of each history: [histories, width]."""
    kept = histories.lengths if window is None else np.minimum(histories.lengths, window)
    last = histories.take(histories.ends - kept, kept)
    owners = np.repeat(np.arange(len(last)), kept)
    found = csr_array((np.ones(len(owners), np.float32), (owners, last.items)), shape=(len(last), width))
    found.sum_duplicates()
    return found


def chosen_together(histories: Histories, items: int) -> csr_array:
    """Number of histories that hold both of two items, [items + 1, items + 1]; the diagonal counts each single item."""
    chosen = chosen_by(histories, items + 1)
    chosen.data[:] = 1
    return csr_array(chosen.T @ chosen)


def text_vectors(texts: Sequence[str]) -> csr_array:
    """TF-IDF vectors [items + 1, terms] of the items' texts, in order of index.

    Rows have length 1; row 0, padding, is empty.
    """
    # Imported here: workers import this module without counting words, and scikit-learn imports as slowly as torch.
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(sublinear_tf=True, max_features=_TERMS, dtype=np.float32)
    try:
        vectors = csr_array(words.fit_transform(texts))
    except ValueError:  # no text holds a word
        vectors = csr_array((len(texts), 1), dtype=np.float32)
    return csr_array(vstack([csr_array((1, vectors.shape[1]), dtype=np.float32), vectors]))


def text_neighbours(vectors: csr_array, count: int = _NEIGHBOURS) -> csr_array:
    """For each item, the `count` items of the most similar texts, weighted by similarity: [items + 1, items + 1].

    Rows sum to 1, or to 0 if the item's text has no words.
    """
    rows = []
    for start in range(0, vectors.shape[0], _AT_ONCE):
        alike = (vectors[start : start + _AT_ONCE] @ vectors.T).toarray()
        most = min(count, alike.shape[1])
        least = np.partition(alike, -most, axis=1)[:, -most, None]
        rows.append(csr_array(np.where(alike >= np.maximum(least, np.finfo(np.float32).tiny), alike, 0)))
    whole = csr_array(vstack(rows))
    return csr_array(diags_array(1 / np.maximum(whole.sum(1), 1e-12)).astype(np.float32) @ whole)


def _normalised(together: csr_array) -> csr_array:
    """The co-occurrence counts without the diagonal, divided by the square roots of both items' row sums."""
    others = csr_array(together - diags_array(together.diagonal()))
    others.eliminate_zeros()
    scale = diags_array(1 / np.sqrt(np.maximum(others.sum(1), 1))).astype(np.float32)
    return csr_array(scale @ others @ scale)


def _shares(transitions: Transitions) -> csr_array:
    """For each item (row) its share of what followed another (column), [items + 1, items + 1]."""
    followers = transitions.followers
    scale = diags_array(1 / np.maximum(followers.sum(1), 1)).astype(np.float32)
    return csr_array((scale @ followers).T)
