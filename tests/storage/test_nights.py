"""Night manifests: whole or not at all, and a way back."""

from __future__ import annotations

import pytest

from raypipe.errors import UsageError
from raypipe.storage.nights import Night, Nights
from raypipe.storage.store import Store


@pytest.fixture
def nights(workspace_uri: str) -> Nights:
    return Nights(Store(workspace_uri))


def night_of(date: str, **tables: int) -> Night:
    return Night(date, tables, {"lm": "abc"}, {"users": 7}, "summarize-hierarchical")


def test_a_new_workspace_has_no_night(nights: Nights) -> None:
    assert (nights.dates(), nights.current(), nights.get("2026-01-01")) == ([], None, None)


def test_a_published_night_is_in_force(nights: Nights) -> None:
    night = night_of("2026-01-02", summaries=3)
    nights.publish(night_of("2026-01-01", summaries=2))
    nights.publish(night)
    assert nights.current() == night
    assert nights.dates() == ["2026-01-01", "2026-01-02"]


def test_pointing_back_puts_an_earlier_night_in_force(nights: Nights) -> None:
    for date, version in (("2026-01-01", 1), ("2026-01-02", 2)):
        nights.publish(night_of(date, summaries=version))
    assert nights.point_to("2026-01-01").tables == {"summaries": 1}
    current = nights.current()
    assert current is not None
    assert current.date == "2026-01-01"


def test_an_unknown_date_is_refused_and_the_known_ones_are_named(nights: Nights) -> None:
    nights.publish(night_of("2026-01-01"))
    with pytest.raises(UsageError, match=r"No night of 2026-02-01 was published. The newest are: 2026-01-01."):
        nights.point_to("2026-02-01")
    with pytest.raises(UsageError, match="is not a date"):
        nights.get("../workspace")
    current = nights.current()
    assert current is not None
    assert current.date == "2026-01-01"


@pytest.mark.parametrize("data", [b"", b'{"date": "2026-', b"[]", b'{"night": 1}'])
def test_a_damaged_pointer_is_told_with_the_way_back(nights: Nights, data: bytes) -> None:
    nights.publish(night := night_of("2026-01-01"))
    nights.store.put("nights/current.json", data)
    with pytest.raises(UsageError, match=r"nights/current.json, which names the night in force, is damaged") as told:
        nights.current()
    assert told.value.remedy == (
        "Put a night in force with `raypipe night --restore DATE`. The newest are: 2026-01-01."
    )
    nights.point_to("2026-01-01")
    assert nights.current() == night


@pytest.mark.parametrize("data", [b"", b"{", b'{"tables": {}}'])
def test_a_damaged_night_is_told_with_what_to_do(nights: Nights, data: bytes) -> None:
    nights.publish(night_of("2026-01-01"))
    nights.publish(newest := night_of("2026-01-02"))
    nights.store.put("nights/2026-01-01.json", data)
    with pytest.raises(UsageError, match=r"nights/2026-01-01.json is damaged: .* Restore it from a backup; or delete"):
        nights.get("2026-01-01")
    assert nights.current() == newest


def test_cards_beside_a_night_are_no_night(nights: Nights) -> None:
    nights.publish(night_of("2026-01-01"))
    nights.store.put("nights/2026-01-01/cards.html", b"<html>")
    assert nights.dates() == ["2026-01-01"]
