"""What the words of free-text explanations reveal.

Distinction and coherence are RecExplainer's (arXiv 2311.10947): can a classifier tell which system wrote an
explanation, and can a regressor read f's score of the item from it? The paper uses language models for both. Here both
are linear in TF-IDF weights of words, with an L2 penalty of 1. They are fitted on the other folds only, and each is
reported beside the value that a guess without the text gives.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import logsumexp

_WORD = re.compile(r"\w+")
_STEPS = 300

Floats = NDArray[np.float64]
_Loss = Callable[[Floats], tuple[float, Floats]]


@dataclass(frozen=True)
class Distinction:
    """The share of explanations whose writer is recognised, and the share that guessing gives."""

    accuracy: float
    chance: float


def distinction(explanations: Mapping[str, Sequence[str]], folds: int = 5, seed: int = 0) -> Distinction:
    """How well a logistic regression recognises the system that wrote an explanation it was not fitted on.

    `explanations` are by system, each with the same cases in the same order. All explanations of a case are in one
    fold, so what they say about the case does not reveal the writer. Raises ValueError if there are fewer than two
    systems or cases, or if a system lacks a case.
    """
    systems, counts = len(explanations), {len(texts) for texts in explanations.values()}
    if systems < 2 or len(counts) != 1:
        raise ValueError("Distinction compares at least two systems, on the same cases.")
    (cases,) = counts
    texts = [text for texts in explanations.values() for text in texts]
    writers = np.repeat(np.arange(systems), cases)
    right = np.zeros(len(texts), bool)
    for learnt, asked in _folds(list(range(cases)) * systems, folds, seed):
        scores = _out_of_fold(texts, learnt, asked, systems, _cross_entropy(writers[learnt]))
        right[asked] = scores.argmax(1) == writers[asked]
    return Distinction(float(right.mean()), 1 / systems)


@dataclass(frozen=True)
class Coherence:
    """Mean squared error of scores read from explanations, and that of the mean score of the other folds."""

    mse: float
    constant: float


def coherence(
    texts: Sequence[str], scores: NDArray[np.floating], users: Sequence[Hashable], folds: int = 5, seed: int = 0
) -> Coherence:
    """How well a ridge regression reads f's `scores` [n] from explanations of users it was not fitted on.

    Raises ValueError for fewer than two users.
    """
    values = np.asarray(scores, np.float64)
    read, constant = np.zeros_like(values), np.zeros_like(values)
    for learnt, asked in _folds(users, folds, seed):
        constant[asked] = mean = values[learnt].mean()
        spread = values[learnt].std() or 1.0  # makes the fit's precision independent of the scores' scale
        errors = _squared_error((values[learnt] - mean) / spread)
        read[asked] = mean + spread * _out_of_fold(texts, learnt, asked, 1, errors)[:, 0]
    return Coherence(float(((read - values) ** 2).mean()), float(((constant - values) ** 2).mean()))


def _folds(groups: Sequence[Hashable], folds: int, seed: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (rows to fit on, rows to test on) for each fold. All rows of a group are on the same side."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    if len(numbers) < 2:
        raise ValueError("Cross-validation wants at least two cases or users: one to learn from, one to ask about.")
    fold_of = np.random.default_rng(seed).permutation(len(numbers)) % folds
    of_row = fold_of[[numbers[group] for group in groups]]
    for fold in range(min(folds, len(numbers))):
        yield np.flatnonzero(of_row != fold), np.flatnonzero(of_row == fold)


class _TfIdf:
    """TF-IDF weights of words: count × (ln((1 + texts) / (1 + texts with the word)) + 1).

    The weights of each text are scaled to length 1.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in set(_words(text)))
        self.columns = {word: column for column, word in enumerate(sorted(counts))}
        self.weights = np.array([np.log((1 + len(texts)) / (1 + counts[word])) + 1 for word in self.columns])

    def features(self, texts: Sequence[str]) -> csr_array:
        """The weights of texts: [texts, words]. Words that do not occur in the constructor's texts are left out."""
        found = [Counter(self.columns[word] for word in _words(text) if word in self.columns) for text in texts]
        ends = np.cumsum([0, *map(len, found)])
        columns = np.array([column for counts in found for column in counts], np.int64)
        counts = np.array([count for counts in found for count in counts.values()], np.float64)
        values = counts * self.weights[columns] if len(columns) else counts
        rows = np.repeat(np.arange(len(texts)), np.diff(ends))
        lengths = np.sqrt(np.bincount(rows, values**2, len(texts)))
        return csr_array((values / lengths[rows], columns, ends), shape=(len(texts), len(self.columns)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _out_of_fold(
    texts: Sequence[str], learnt: NDArray[np.int64], asked: NDArray[np.int64], outputs: int, loss: _Loss
) -> Floats:
    """Predictions [asked, outputs] of a linear model that is fitted to the texts `learnt`.

    `loss` takes scores [learnt, outputs] and returns their loss and its gradient. Half the squared length of the
    weights is added, without the intercepts.
    """
    words = _TfIdf([texts[row] for row in learnt])
    features = words.features([texts[row] for row in learnt])
    shape = (features.shape[1] + 1, outputs)

    def penalised(flat: Floats) -> tuple[float, Floats]:
        weights = flat.reshape(shape)
        value, gradient = loss(features @ weights[:-1] + weights[-1])
        by_weight = np.vstack([features.T @ gradient + weights[:-1], gradient.sum(0)])
        return value + float((weights[:-1] ** 2).sum()) / 2, by_weight.ravel()

    found = minimize(penalised, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
    weights = found.x.reshape(shape)
    return words.features([texts[row] for row in asked]) @ weights[:-1] + weights[-1]


def _cross_entropy(labels: NDArray[np.int64]) -> _Loss:
    rows = np.arange(len(labels))

    def loss(scores: Floats) -> tuple[float, Floats]:
        log_shares = scores - logsumexp(scores, axis=1, keepdims=True)
        gradient = np.exp(log_shares)
        gradient[rows, labels] -= 1
        return -float(log_shares[rows, labels].sum()), gradient

    return loss


def _squared_error(values: Floats) -> _Loss:
    def loss(scores: Floats) -> tuple[float, Floats]:
        error = scores - values[:, None]
        return float((error**2).sum()) / 2, error

    return loss
