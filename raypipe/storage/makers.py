"""Which runs made the published rows of a variant, as the ledger tells it."""

from __future__ import annotations

from collections.abc import Iterator

from raypipe.storage.ledger import Ledger, Run


def makers(ledger: Ledger, variant: str) -> list[Run]:
    """The runs that made the published rows of `variant`, newest first; none if no run of it is known.

    A run leaves no row of another recipe, so that the newest that ended made all of them or found them made by its own
    recipe. If it was killed and another job published the buckets that it had finished, the others are of the runs
    before it.
    """
    return [run for name, run in _standing(ledger, variant) if name == variant]


def all_makers(ledger: Ledger) -> list[Run]:
    """The runs that made the published rows of every variant, newest first."""
    return [run for _, run in _standing(ledger)]


def _standing(ledger: Ledger, wanted: str | None = None) -> Iterator[tuple[str, Run]]:
    """These runs with their variants. The search stops once those of the variant `wanted` are found."""
    whole: set[str] = set()
    for run in ledger.finished():
        variant = run.manifest.get("facts", {}).get("variant")
        if variant is None or variant in whole:
            continue
        yield variant, run
        result = run.result()
        if result is not None and result["status"] != "interrupted":
            whole.add(variant)
        if wanted in whole:
            return
