"""The limit on rejected rows that stops a phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raypipe.errors import RaypipeError
from raypipe.storage.ledger import Counts, Receipt, Unit, counts_of

_FEW_REJECTS = 10


class RejectLimit:
    """At most the share `most` of the rows that a phase has read may be rejected."""

    def __init__(self, most: float) -> None:
        self.most = most
        self._units: set[Unit] = set()
        self._counts = Counts()
        self._reasons: dict[str, str] = {}

    def count(self, receipts: Iterable[Receipt]) -> None:
        """Count the receipts, each unit once.

        The fact `reasons` of a receipt says why rows were rejected, reason → message.
        """
        for receipt in receipts:
            if receipt.unit not in self._units:
                self._units.add(receipt.unit)
                self._counts += receipt.counts
                self._reasons |= receipt.facts.get("reasons", {})

    def check(self) -> None:
        """Raise RaypipeError if more than that share of the rows counted so far was rejected."""
        counts = self._counts
        if not self._is_too_much(counts):
            return
        told = " ".join(f"{reason}: {message}" for reason, message in sorted(self._reasons.items()))
        read = counts.ok + counts.rejected
        raise RaypipeError(
            f"{counts.rejected:,} of the first {read:,} rows were rejected, more than max_reject_rate {self.most:.0%}. {told}",
            "Mend the model, the prompts or the endpoint and submit again: what was rejected is tried once more. Or go on as it is "
            "with a higher --max_reject_rate.",
        )

    def undone(self, receipts: Mapping[Unit, Receipt]) -> list[Unit]:
        """The units to run again after `check` stopped an earlier submission: those whose own share is too large.

        There are none if the check would pass now, for example with a larger `most`.
        """
        if not self._is_too_much(counts_of(receipts.values())):
            return []
        return [unit for unit, receipt in receipts.items() if self._is_above(receipt.counts)]

    def _is_too_much(self, counts: Counts) -> bool:
        """Whether the share is too large. A handful of rejects proves nothing and is never too much."""
        return counts.rejected >= _FEW_REJECTS and self._is_above(counts)

    def _is_above(self, counts: Counts) -> bool:
        return counts.rejected > self.most * (counts.ok + counts.rejected)
