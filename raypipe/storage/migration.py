"""From an older workspace format to the one this raypipe reads and writes.

A step changes what lies in the workspace so that the next format holds, and only then is that format written: a step that
was killed is done again from its beginning, so doing it twice has to be the same as once. Readers of the older format are
refused from then on. A new column that may be null, a new folder or a new kind of file is no new format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from raypipe.storage import workspace as formats
from raypipe.storage.store import Store

STEPS: Mapping[int, Callable[[Store], None]] = {}
"""Format → what makes a workspace of it one of the next."""


def migrate(store: Store) -> list[int]:
    """Brings the workspace to this raypipe's format; the formats it had on the way. The caller holds every lock."""
    passed = []
    while (found := formats.found_format(store)) is not None and found < formats.FORMAT:
        STEPS[found](store)
        formats.write_format(store, found + 1)
        passed.append(found)
    return passed
