"""Night manifests: they say which table versions and which release belong together.

They are written last and read first.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raypipe.errors import UsageError
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.store import Store

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_CURRENT = "nights/current.json"


@dataclass(frozen=True)
class Night:
    """One published night: its table versions, their release, and the variant of summaries that it maintains."""

    date: str
    tables: Mapping[str, int]
    release: Mapping[str, Any]
    metrics: Mapping[str, Any]
    summaries: str


class Nights:
    """All nights of a workspace, and which of them is in force."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def dates(self) -> list[str]:
        names = (entry.path.rsplit("/", 1)[1].removesuffix(".json") for entry in self.store.list("nights"))
        return sorted(name for name in names if _DATE.fullmatch(name))

    def get(self, date: str) -> Night | None:
        """The night of that date, or None if none was published. Raises UsageError if its manifest is damaged."""
        data = self.store.get(path := f"nights/{check_date(date)}.json")
        if data is None:
            return None
        try:
            return Night(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{self.store.object_uri(path)} is damaged: {error}.",
                "Restore it from a backup; or delete it and put another night in force with `raypipe night --restore DATE`.",
            ) from error

    def current(self) -> Night | None:
        """The night in force: the newest one, or an earlier one that was put back in force.

        Raises UsageError if the file that names it or its manifest is damaged.
        """
        data = self.store.get(_CURRENT)
        if data is None:
            return None
        try:
            date = str(json.loads(data)["date"])
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"{self.store.object_uri(_CURRENT)}, which names the night in force, is damaged.",
                f"Put a night in force with `raypipe night --restore DATE`. {_known(self.dates())}",
            ) from None
        return self.get(date)

    def publish(self, night: Night) -> None:
        """Write the night, then put it in force. A reader sees it whole or not at all."""
        self.store.put(f"nights/{check_date(night.date)}.json", canonical_json(asdict(night)).encode())
        self.point_to(night.date)

    def rewrite(self, night: Night) -> None:
        """Replace the table versions of a published night by others of equal meaning.

        The night in force does not change.
        """
        self.store.put(f"nights/{check_date(night.date)}.json", canonical_json(asdict(night)).encode())

    def remove(self, date: str) -> None:
        """Delete a night and its cards. It must not be the night in force."""
        current = self.current()
        assert current is None or current.date != date, f"the night of {date} is in force"
        self.store.delete([f"nights/{check_date(date)}.json"])
        self.store.delete_folder(f"nights/{date}")

    def point_to(self, date: str) -> Night:
        """Put a published night in force. Raises UsageError if no night of that date was published."""
        night = self.get(date)
        if night is None:
            raise UsageError(f"No night of {date} was published.", _known(self.dates()))
        self.store.put(_CURRENT, canonical_json({"date": date}).encode())
        return night


def _known(dates: Sequence[str]) -> str:
    return f"The newest are: {', '.join(dates[-5:]) or 'none'}."


def check_date(date: str) -> str:
    """The date itself. Raises UsageError if it is not a date."""
    try:
        if not _DATE.fullmatch(date):
            raise ValueError
        datetime.date.fromisoformat(date)
    except ValueError:
        raise UsageError(f"{date!r} is not a date.", "Write it as YYYY-MM-DD.") from None
    return date
