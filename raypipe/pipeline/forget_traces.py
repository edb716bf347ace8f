"""Where a user may be named beside the tables of users: rejects, cards of a night, judgements, older versions."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.storage.hashing import stable_hash
from raypipe.storage.schemas import REJECTS
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace

_ARTICLE = re.compile(r"<article><h2>User (.*?) <small>.*?</article>\n?", re.DOTALL)
# The tables whose rejects are keyed by the user; those of logs are keyed by a place in a file.
_OF_LOGS = "histories"
_OF_NOBODY = "items"


def rejects_to_keep(rows: pa.Table, table: str, users: Sequence[str]) -> NDArray[np.bool_]:
    """Which rejects of a table are of none of the users: [rows].

    A rejected row of a log says what stood where in the log's own words, or is a line nobody could read: it is a user's
    where the id is one of its values, or stands alone in the line.
    """
    if table == _OF_NOBODY:
        return np.ones(rows.num_rows, bool)
    named = set(users)
    if table != _OF_LOGS:
        mine = pc.is_in(rows["key"].combine_chunks(), value_set=pa.array(users, pa.string()))
        return ~mine.to_numpy(zero_copy_only=False)
    alone = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, users))})(?!\w)")
    return np.array([not _is_of(json.loads(row), named, alone) for row in rows["row"].to_pylist()], bool)


def _is_of(row: dict[str, Any], users: set[str], alone: re.Pattern[str]) -> bool:
    if set(row) == {"line"}:
        return alone.search(str(row["line"])) is not None
    return any(str(value) in users for value in _values(row))


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _values(part)
    else:
        yield value


def holds_user(workspace: Workspace, name: str, version: int, users: Sequence[str]) -> bool:
    """Whether a version of a table holds a row of one of the users."""
    table = workspace.tables[name]
    if not users or name in {"logs", "items", "item_states", "tombstones"}:
        return False
    if name == REJECTS.name:
        partitions = table.partitions(version)
        return any(
            not rejects_to_keep(table.read_files(files, REJECTS.columns.names), str(values["table"]), users).all()
            for values, files in partitions
        )
    value_set = pa.array(users, pa.string())
    hashes = stable_hash(value_set)
    for values, files in table.partitions(version):
        # Older versions may have fewer buckets: a user is where some of the hash's last bits say.
        bucket = int(values["bucket"])
        bits = np.uint64((1 << max(2, bucket.bit_length())) - 1)
        if not np.any((hashes & bits) == bucket):
            continue
        if pc.any(pc.is_in(table.read_files(files, ["user_id"])["user_id"], value_set=value_set)).as_py():
            return True
    return False


def forget_in_cards(store: Store, date: str, users: Sequence[str]) -> None:
    """A night's page without the cards of the users."""
    path = f"nights/{date}/cards.html"
    if (data := store.get(path)) is None:
        return
    shown = {html.escape(user[:80]) for user in users}
    page = data.decode()
    kept = _ARTICLE.sub(lambda found: "" if found[1] in shown else found[0], page)
    if kept != page:
        store.put(path, kept.encode())


def forget_in_judgements(store: Store, users: Sequence[str]) -> None:
    """Every judgement without what was said of the users; its figures stay."""
    named = set(users)
    for entry in store.list("judgements"):
        report = json.loads(store.read(entry.path))
        if named & set(report["users"]):
            store.put(entry.path, json.dumps(without_users(report, named), ensure_ascii=False, indent=1).encode())


def without_users(report: Mapping[str, Any], users: Set[str]) -> dict[str, Any]:
    """A judgement without what was said of the users; its figures stay."""
    stay = [user not in users for user in report["users"]]
    ratings = {judge: list(compress(given, stay)) for judge, given in report["ratings"].items()}
    return {**report, "users": list(compress(report["users"], stay)), "ratings": ratings}
