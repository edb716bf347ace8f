"""Histories and the catalogue of a workspace as recommenders read them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.language.catalogue import Catalogue
from raypipe.language.titles import distinct_titles
from raypipe.pipeline.held_out import are_held_out
from raypipe.recommenders.windows import Histories, tie_groups
from raypipe.storage.fingerprint import fingerprint_of_digits
from raypipe.storage.hashing import stable_hash
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace


def pinned_versions(workspace: Workspace) -> dict[str, int]:
    """The newest versions of items and histories. Raises UsageError if nothing was ingested."""
    # Histories first: an ingest publishes its items before them, and no history may name an item of a later version.
    versions = {name: workspace.tables[name].version() for name in ("histories", "items")}
    if ABSENT in versions.values():
        raise UsageError(
            f"The workspace {workspace.uri} has no histories to learn from.", "Run `raypipe ingest` first."
        )
    return versions


def catalogue_of(items: pa.Table) -> Catalogue:
    """The catalogue as language models read it. `items` are its rows in order of index."""
    return Catalogue(
        distinct_titles(items["title"].to_pylist(), items["item_id"].to_pylist()),
        [dict(pairs) for pairs in items["attributes"].to_pylist()],
        items["text"].to_pylist(),
    )


def read_histories(workspace: Workspace, version: int, held_out_share: float = 0.0) -> tuple[pa.Array, Histories]:
    """All users except those held out, sorted by id, and their items in time order."""
    users, items, ends = _lists(workspace, version, "items", held_out_share)
    return users, Histories(items.astype(np.int32), ends, user_keys(users))


def user_keys(users: pa.Array) -> NDArray[np.int64]:
    """The keys by which models know users: int64 [users]."""
    return stable_hash(users).view(np.int64)


def read_ties(workspace: Workspace, version: int, held_out_share: float = 0.0) -> Histories:
    """As `read_histories`, with group numbers in the place of items: a user's events of one time are one group."""
    _, times, ends = _lists(workspace, version, "times", held_out_share)
    return Histories(tie_groups(times, ends), ends)


def histories_hash(workspace: Workspace, version: int) -> str:
    """A hash of everybody's history. It does not depend on the version that holds the histories."""
    rows = workspace.tables["histories"].read(version, ["user_id", "history_key"]).sort_by("user_id")
    return fingerprint_of_digits("keys", rows["history_key"])


def _lists(
    workspace: Workspace, version: int, name: str, held_out_share: float
) -> tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]:
    """Users sorted by id, the values of a list column one user after the other, and where each user's values end."""
    rows = workspace.tables["histories"].read(version, ["user_id", name])
    if held_out_share:
        rows = rows.filter(pa.array(~are_held_out(rows["user_id"].combine_chunks(), held_out_share)))
    rows = rows.sort_by("user_id").combine_chunks()
    lists = rows[name].combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return rows["user_id"].combine_chunks(), lists.flatten().to_numpy(zero_copy_only=False), lengths.cumsum()
