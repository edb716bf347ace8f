"""One user bucket, for jobs that compute something of every user: who has changed, and what is carried over.

A user who gets no new row keeps an older one of the same recipe, whether a cap left the user out, the row was rejected,
or the user is blocked. The older row keeps its change key, so that it is made anew as soon as it can be.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.pipeline.sampling_seeds import user_seeds
from raypipe.pipeline.sequences import user_keys
from raypipe.recommenders.windows import Histories
from raypipe.storage.change_keys import keys_of, recipes_of
from raypipe.storage.hashing import digest_lanes
from raypipe.storage.workspace import Workspace


@dataclass(frozen=True)
class UserRows:
    """The users of a bucket at the pinned versions, and their published rows of one variant.

    A user's change key is made of the history's key and the recipe. `only` restricts the users to those of a canary.
    """

    workspace: Workspace
    bucket: int
    output: str
    variant: str
    recipe: str
    histories_version: int
    output_version: int
    only: pa.Array | None = None

    @cached_property
    def _histories(self) -> pa.Table:
        columns = ["user_id", "items", "history_key"]
        rows = self.workspace.tables["histories"].read(self.histories_version, columns, bucket=self.bucket)
        if self.only is not None:
            rows = rows.filter(pc.is_in(rows["user_id"], value_set=self.only))
        return rows.sort_by("user_id").combine_chunks()

    @cached_property
    def users(self) -> pa.Array:
        return self._histories["user_id"].combine_chunks()

    @cached_property
    def histories(self) -> Histories:
        lists = self._histories["items"].combine_chunks()
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        items = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        return Histories(items, lengths.cumsum(), user_keys(self.users))

    @cached_property
    def change_keys(self) -> pa.Array:
        return change_keys(self._histories["history_key"].combine_chunks(), self.recipe)

    @cached_property
    def seeds(self) -> NDArray[np.int64]:
        return user_seeds(self.users, self._histories["history_key"].combine_chunks())

    @cached_property
    def before(self) -> pa.Table:
        table = self.workspace.tables[self.output]
        names = table.spec.columns.names
        return table.read(self.output_version, names, variant=self.variant, bucket=self.bucket)

    @cached_property
    def changed(self) -> NDArray[np.int64]:
        """The users whose published row is not of today's change key, or who have none, by their place in `users`."""
        standing = pa.array(are_standing(self.before, self.users, self.change_keys))
        known = pc.is_in(self.users, value_set=self.before["user_id"].combine_chunks().filter(standing))
        return np.flatnonzero(~known.to_numpy(zero_copy_only=False))

    def carried_over(self, made: NDArray[np.int64]) -> CarriedOver:
        """The published rows that stay when the users at the places `made` have new ones."""
        return carry_over(self.before, self.before["user_id"], self.users, self.change_keys, self.users.take(made))

    def divide(self, rows: pa.Table, blocked: Container[tuple[str, str]]) -> tuple[pa.Table, dict[str, int]]:
        """The rows there is work for, and how many of the others are unchanged, or `blocked` by (user, change key).

        `rows` are all that there should be. It is for jobs whose change keys are of more than a history.
        """
        before, wanted = _identities(self.before), _identities(rows)
        changed = rows.filter(pc.invert(pc.is_in(wanted, value_set=before)))
        keys = zip(changed["user_id"].to_pylist(), changed["change_key"].to_pylist(), strict=True)
        work = changed.filter(pa.array([key not in blocked for key in keys], pa.bool_()))
        skipped = {"unchanged": rows.num_rows - changed.num_rows, "blocked": changed.num_rows - work.num_rows}
        return work, skipped


@dataclass(frozen=True)
class CarriedOver:
    """Published rows that are published again.

    `stale` is how many users, or other owners of rows, have older rows than they should.
    """

    rows: pa.Table
    stale: int


def carry_over(before: pa.Table, owners: pa.Array, wanted: pa.Array, keys: pa.Array, made: pa.Array) -> CarriedOver:
    """The published rows of `before` that are current, and older ones of the same recipe whose owners get no new row.

    `owners` [rows] says whose each row is, null if it is nobody's any more and goes. `wanted` [n] are all owners who
    should have rows, `keys` [n] the change keys of these rows, and `made` the owners who get new ones.
    """
    due = keys.take(pc.index_in(owners, value_set=wanted))
    stands = pc.fill_null(pc.equal(before["change_key"], due), False)
    of_recipe = pc.fill_null(pc.equal(recipes_of(before["change_key"]), recipes_of(due)), False)
    older = pc.and_not(of_recipe, pc.or_(stands, pc.is_in(owners, value_set=made)))
    return CarriedOver(before.filter(pc.or_(stands, older)), pc.count_distinct(owners.filter(older)).as_py())


def change_keys(history_keys: pa.Array, recipe: str) -> pa.Array:
    """The change keys of the rows that `recipe` makes of histories: [users]."""
    return keys_of(digest_lanes(history_keys), recipe)


def are_standing(rows: pa.Table, users: pa.Array, keys: pa.Array) -> NDArray[np.bool_]:
    """Which rows are of one of `users` and have that user's change key of `keys`: bool [rows]."""
    owners = pc.index_in(rows["user_id"].combine_chunks(), value_set=users)
    current = pc.equal(keys.take(owners), rows["change_key"].combine_chunks())
    return pc.fill_null(current, False).to_numpy(zero_copy_only=False)


def _identities(rows: pa.Table) -> pa.ChunkedArray:
    """A name for each row, of user and change key, as two users of one history may share a change key."""
    return pc.binary_join_element_wise(rows["user_id"], rows["change_key"], "\0")
