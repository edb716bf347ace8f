"""How good new summaries are without a judge: figures of a bucket, each given as a sum and a count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from raypipe.metrics.named_values import ItemValues, named_shares
from raypipe.metrics.text import Vocabulary, distinctness, shift_precision, stability, value_counts
from raypipe.pipeline.summary_state import BucketState, PromptCatalogue
from raypipe.systems.summaries import SummariesConfig

QUALITY = (
    "attribute_precision",
    "attribute_coverage",
    "untouched_share",
    "shift_precision",
    "stability",
    "distinctness",
)
"""What is measured of new summaries; `stability` against a user's older one, `distinctness` within a bucket."""


class SummaryQuality:
    """Measures summaries by the attribute values of the catalogue that they name."""

    def __init__(self, catalogue: PromptCatalogue, config: SummariesConfig) -> None:
        self._of_items = catalogue.values
        self._numbered = ItemValues(catalogue.values)
        self._vocabulary = Vocabulary(chain.from_iterable(catalogue.values))
        self._recent = config.prompts.recent_blocks * config.block_items

    def figures(self, state: BucketState, users: Sequence[int], summaries: Sequence[str]) -> dict[str, list[float]]:
        """The sum and the count of each figure of `QUALITY` over these users' new summaries."""
        named = list(map(self._vocabulary.named, summaries))
        windows = state.windows(users)
        shares = named_shares(named, windows.items, windows.lengths, self._numbered)
        bounds = zip(windows.starts.tolist(), windows.ends.tolist(), strict=True)
        shifts = [
            self._shift(lately, windows.items[start:end])
            for summary, (start, end) in zip(summaries, bounds, strict=True)
            if (lately := self._vocabulary.named_lately(summary))
        ]
        kept = [
            stability(self._vocabulary.named(old), new)
            for old, new in zip(state.summaries_before(users), named, strict=True)
            if old is not None
        ]
        distinct = distinctness(summaries)
        return {
            "attribute_precision": _summed(shares.precision),
            "attribute_coverage": _summed(shares.coverage),
            "untouched_share": _summed(shares.untouched),
            "shift_precision": _summed(shifts),
            "stability": _summed(kept),
            "distinctness": [0.0, 0] if distinct is None else [distinct * len(summaries), len(summaries)],
        }

    def _shift(self, lately: Sequence[str], items: NDArray[np.int32]) -> float | None:
        """The share of what a summary calls new that is more frequent in the last blocks of the window than before.

        None if it cannot be told.
        """
        values = [self._of_items[item] for item in items.tolist()]
        earlier, later = values[: -self._recent], values[-self._recent :]
        return shift_precision(lately, value_counts(earlier), value_counts(later), len(earlier), len(later))


def _summed(figures: Sequence[float | None] | NDArray[np.float64]) -> list[float]:
    """The sum and the count of figures, without those that are None or NaN."""
    said = np.array(figures, np.float64)
    said = said[~np.isnan(said)]
    return [float(said.sum()), len(said)]
