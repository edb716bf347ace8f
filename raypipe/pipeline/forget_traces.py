"""Places beside the tables of users that may name a user: rejects, cards of a night, judgements, older versions."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.data.jsonlines import scalar_text
from raypipe.storage.hashing import stable_hash
from raypipe.storage.schemas import REJECTS
from raypipe.storage.store import Store
from raypipe.storage.tables import StagedFile, Table
from raypipe.storage.workspace import Workspace

_ARTICLE = re.compile(r"<article><h2>User (.*?) <small>.*?</article>\n?", re.DOTALL)
# Rejects are keyed by the user, but for those of logs, which are keyed by a place in a file, and those of items.
_OF_LOGS = "histories"
_OF_NOBODY = "items"
# In Arrow's dialect: characters that are not \w, and the escapes that JSON writes in the place of such characters.
_BETWEEN_WORDS = r"[^\pL\pN_]+"
_ESCAPED = r"\\(?:u[0-9a-fA-F]{4}|.)"
_ROWS_AT_ONCE = 1 << 17


class Sought:
    """Users to be forgotten, and where they are found.

    Each file of the workspace is read once, however many versions share it. A rejected row of a log holds the log's own
    values, or a line that nobody could read. It is a user's if the id is one of its values, or stands alone in the
    line.
    """

    def __init__(self, workspace: Workspace, users: Sequence[str]) -> None:
        self.workspace = workspace
        self.users = pa.array(users, pa.string())
        self.hashes = stable_hash(self.users)
        self.named = frozenset(users)
        self.by_word, self.wordless = _by_word(self.users)
        self._found: dict[tuple[str, str], bool] = {}

    def are_in(self, name: str, version: int) -> bool:
        """Whether a version of a table holds a row of one of the users."""
        if not self.named or name in {"logs", "items", "item_states", "tombstones"}:
            return False
        table = self.workspace.tables[name]
        return any(self._are_in_file(table, file) for file in table.files(version))

    def _are_in_file(self, table: Table, file: StagedFile) -> bool:
        place = (table.spec.name, file.path)
        if place not in self._found:
            self._found[place] = self._read(table, file)
        return self._found[place]

    def _read(self, table: Table, file: StagedFile) -> bool:
        if table.spec.name == REJECTS.name:
            rows = table.read_files([file], REJECTS.columns.names)
            return not self.rejects_to_keep(rows, file.partition["table"]).all()
        # Older versions may have fewer buckets: compare as many of the hash's last bits as the bucket's number has.
        bucket = int(file.partition["bucket"])
        bits = np.uint64((1 << max(2, bucket.bit_length())) - 1)
        if not np.any((self.hashes & bits) == bucket):
            return False
        there = table.read_files([file], ["user_id"])["user_id"]
        return bool(pc.any(pc.is_in(there, value_set=self.users)).as_py())

    def rejects_to_keep(self, rows: pa.Table, table: str) -> NDArray[np.bool_]:
        """Which rejects of a table belong to none of the users: bool [rows]."""
        if table == _OF_NOBODY:
            return np.ones(rows.num_rows, bool)
        if table != _OF_LOGS:
            mine = pc.is_in(rows["key"].combine_chunks(), value_set=self.users)
            return ~mine.to_numpy(zero_copy_only=False)
        parts = (part["row"] for part in rows.select(["row"]).to_batches(_ROWS_AT_ONCE))
        return np.concatenate([np.zeros(0, bool), *(self._log_rows_to_keep(part) for part in parts)])

    def _log_rows_to_keep(self, rows: pa.Array) -> NDArray[np.bool_]:
        """Which rejected rows of logs, as JSON, belong to none of the users: bool [rows].

        Few rows hold a word of an id, and only those are looked at one by one.
        """
        words = pc.split_pattern_regex(pc.replace_substring_regex(rows, _ESCAPED, " "), _BETWEEN_WORDS)
        known = pc.is_in(words.flatten(), value_set=pa.array(self.by_word, pa.string()))
        suspect = np.zeros(len(rows), bool)
        suspect[pc.list_parent_indices(words).filter(known).to_numpy()] = True
        for user in self.wordless:
            spelled = json.dumps(user, ensure_ascii=False)[1:-1]
            suspect |= pc.match_substring(rows, spelled).to_numpy(zero_copy_only=False)
        stay = np.ones(len(rows), bool)
        for place in np.flatnonzero(suspect).tolist():
            stay[place] = not self._is_theirs(rows[place].as_py(), words[place].as_py())
        return stay

    def _is_theirs(self, row: str, words: Sequence[str]) -> bool:
        told = json.loads(row)
        if set(told) != {"line"}:
            return any(value in self.named for value in _values(told))
        line = str(told["line"])
        suspects = {user for word in words for user in self.by_word.get(word, ())}
        return any(_stands_alone(user, line) for user in {*suspects, *self.wordless})


def _by_word(users: pa.Array) -> tuple[dict[str, list[str]], list[str]]:
    """The users by that word of their id which the fewest users have, and the users whose ids have no words.

    If an id stands alone in a text, all of its words are whole words of the text: the characters between them are those
    of the id.
    """
    parts = pc.split_pattern_regex(users, _BETWEEN_WORDS).to_pylist()
    words = {user: {*mine} - {""} for user, mine in zip(users.to_pylist(), parts, strict=True)}
    counts = Counter(word for mine in words.values() for word in mine)
    found: dict[str, list[str]] = {}
    for user, mine in words.items():
        if mine:
            found.setdefault(min(mine, key=lambda word: (counts[word], -len(word), word)), []).append(user)
    return found, [user for user, mine in words.items() if not mine]


def _stands_alone(user: str, line: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(user)}(?!\w)", line) is not None


def _values(value: Any) -> Iterator[str]:
    """The values in a row, spelled as ids are."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _values(part)
    elif value is not None:
        yield str(scalar_text(value))


def forget_in_cards(store: Store, date: str, users: Sequence[str]) -> None:
    """Remove the users' cards from a night's page."""
    path = f"nights/{date}/cards.html"
    if (data := store.get(path)) is None:
        return
    shown = {html.escape(user[:80]) for user in users}
    page = data.decode()
    kept = _ARTICLE.sub(lambda found: "" if found[1] in shown else found[0], page)
    if kept != page:
        store.put(path, kept.encode())


def forget_in_judgements(store: Store, users: Sequence[str]) -> None:
    """Remove what was said of the users from every judgement. Its figures stay."""
    named = set(users)
    for entry in store.list("judgements"):
        report = json.loads(store.read(entry.path))
        if named & set(report["users"]):
            store.put(entry.path, json.dumps(without_users(report, named), ensure_ascii=False, indent=1).encode())


def without_users(report: Mapping[str, Any], users: Set[str]) -> dict[str, Any]:
    """A judgement without what was said of the users. Its figures stay."""
    stay = [user not in users for user in report["users"]]
    ratings = {judge: list(compress(given, stay)) for judge, given in report["ratings"].items()}
    return {**report, "users": list(compress(report["users"], stay)), "ratings": ratings}
