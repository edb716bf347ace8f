"""Answers queries with the release and night that are served.

It knows neither HTTP nor Ray, so that every entry point gives the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.data.recommendable import UnknownValueError
from raypipe.serving.config import ServiceConfig
from raypipe.serving.queries import (
    Item,
    Origin,
    RecommendAnswer,
    RecommendQuery,
    ScoreAnswer,
    ScoredItem,
    ScoreQuery,
    User,
    UserOrHistory,
    Users,
)
from raypipe.serving.recommending import ListSpec, ModelInputs, Ranked
from raypipe.serving.served import Served
from raypipe.storage.hashing import stable_hash
from raypipe.storage.online import OnlineStore, OnlineStoreDownError, UserRecord

Code = Literal[
    "no_such_user",
    "no_such_value",
    "no_such_item",
    "nothing_known",
    "no_adapter",
    "no_language_model",
    "no_answer",
    "too_much",
    "busy",
    "deadline",
    "store_down",
    "not_ready",
    "internal",
]
Query = RecommendQuery | ScoreQuery
Answer = RecommendAnswer | ScoreAnswer
_SHOWN = 200


class RefusedQueryError(Exception):
    """A query that gets no answer: `code` is for programs, `message` for people."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@dataclass(frozen=True)
class ResolvedUser:
    """The user or history of a query, as the model's `inputs`.

    `is_known`: the night has this user. `unknown_items` counts the items of the history that are not in the catalogue.
    `summaries` are the night's summaries of the user, by paradigm.
    """

    inputs: ModelInputs
    is_known: bool
    unknown_items: int
    summaries: Mapping[str, str] = field(default_factory=dict)


class Service:
    """Answers queries with what `served` returns when a batch begins: one release and night for the whole batch."""

    def __init__(
        self,
        config: ServiceConfig,
        store: OnlineStore,
        served: Callable[[], Served],
        record: Callable[[ModelInputs, ListSpec], None] = lambda inputs, spec: None,
    ) -> None:
        self.config, self.store, self.served, self.record = config, store, served, record

    def answer(self, queries: Sequence[Query]) -> list[Answer | RefusedQueryError]:
        """Answers in the order of the queries. One that cannot be answered gets its error; the others are answered."""
        served = self.served()
        users = self.resolve_users(served, queries)
        found: list[Answer | RefusedQueryError] = [
            user if isinstance(user, RefusedQueryError) else RefusedQueryError("internal", "No answer.")
            for user in users
        ]
        lists: list[tuple[int, ResolvedUser, ListSpec]] = []
        scores: list[tuple[int, ScoreQuery, ResolvedUser]] = []
        for at, (query, user) in enumerate(zip(queries, users, strict=True)):
            if isinstance(user, RefusedQueryError):
                continue
            if isinstance(query, ScoreQuery):
                scores.append((at, query, user))
                continue
            try:
                lists.append((at, user, self.list_spec(served, query)))
            except RefusedQueryError as problem:
                found[at] = problem
        # A call of the model without requests costs as much as a small answer.
        requests = [(user.inputs, spec) for _, user, spec in lists]
        for (at, user, spec), ranked in zip(lists, served.recommend(requests) if requests else (), strict=True):
            found[at] = _recommendations(served, user, ranked)
            self.record(user.inputs, spec)
        pairs = [(user.inputs, served.catalogue.indices(query.items)) for _, query, user in scores]
        for (at, query, user), values in zip(scores, served.score(pairs) if pairs else (), strict=True):
            found[at] = _scores(served, query, user, values)
        return found

    def user(self, user_id: str, shown: int = _SHOWN) -> User:
        """What the night knows of a user, with at most the last `shown` items of the history.

        Raises RefusedQueryError if the night knows no user of that id, or users cannot be looked up.
        """
        served = self.served()
        record = self._record(served, user_id)
        listed = record.listed if record.listed is not None else np.zeros(0, np.int32)
        return User(
            user_id=user_id,
            events=len(record.items),
            history=shown_items(served, record.items[-shown:], None),
            summaries=dict(record.summaries or {}),
            recommended=shown_items(served, listed, record.scores),
            served=origin(served),
        )

    def some_users(self) -> Users:
        """Ids of some users of the night that is served, to look around with."""
        served = self.served()
        return Users(users=list(served.some_users), served=origin(served))

    def _record(self, served: Served, user_id: str) -> UserRecord:
        (packed,) = self._packed(served, [user_id])
        if packed is None:
            raise RefusedQueryError("no_such_user", "The night that is served knows no user of this id.")
        return UserRecord.unpack(packed)

    def _packed(self, served: Served, users: Sequence[str]) -> list[bytes | None]:
        if not served.target.version:
            raise RefusedQueryError("store_down", "No night is loaded: ask by history, or later.")
        try:
            return self.store.get(served.target.version, users)
        except OnlineStoreDownError:
            raise RefusedQueryError("store_down", "Users cannot be looked up now: ask by history, or later.") from None

    def resolve_users(self, served: Served, queries: Sequence[UserOrHistory]) -> list[ResolvedUser | RefusedQueryError]:
        """The user or history of each query, in their order; an error in place of a user that cannot be looked up."""
        users = list(dict.fromkeys(query.user_id for query in queries if query.user_id is not None))
        down: RefusedQueryError | None = None
        packed: dict[str, bytes | None] = {}
        keys: dict[str, int] = {}
        if users:
            keys = dict(zip(users, stable_hash(pa.array(users, pa.string())).view(np.int64).tolist(), strict=True))
            try:
                packed = dict(zip(users, self._packed(served, users), strict=True))
            except RefusedQueryError as problem:
                down = problem
        return [
            self._by_history(served, query.history)
            if query.user_id is None
            else (down if down is not None else self._by_record(served, keys[query.user_id], packed[query.user_id]))
            for query in queries
        ]

    def _by_history(self, served: Served, history: Sequence[str] | None) -> ResolvedUser:
        items = served.catalogue.indices(history or [])
        return ResolvedUser(ModelInputs.of(items), False, len(history or []) - len(items))

    def _by_record(self, served: Served, key: int, packed: bytes | None) -> ResolvedUser:
        if packed is None:
            return ResolvedUser(ModelInputs.of(np.zeros(0, np.int32)), False, 0)
        record = UserRecord.unpack(packed)
        inputs = ModelInputs(record.items, record.seed, record.state if served.states_fit else None, key)
        return ResolvedUser(inputs, True, 0, record.summaries or {})

    def list_spec(self, served: Served, query: RecommendQuery) -> ListSpec:
        """The list that a query asks for. Raises RefusedQueryError for an attribute value that no item has."""
        only = tuple(sorted(query.only.items()))
        try:
            served.catalogue.allowed(only, served.recommender.items)
        except UnknownValueError as problem:
            raise RefusedQueryError("no_such_value", str(problem)) from None
        filter_seen = self.config.filter_seen if query.filter_seen is None else query.filter_seen
        return ListSpec(query.count, only, served.catalogue.indices(query.deny) if query.deny else None, filter_seen)


def _recommendations(served: Served, user: ResolvedUser, ranked: Ranked) -> RecommendAnswer:
    return RecommendAnswer(
        basis="popular" if ranked.scores is None else "model",
        known=user.is_known,
        unknown_items=user.unknown_items,
        items=shown_items(served, ranked.items, ranked.scores),
        served=origin(served),
    )


def _scores(served: Served, query: ScoreQuery, user: ResolvedUser, values: NDArray[np.float32] | None) -> ScoreAnswer:
    known = iter(values.tolist() if values is not None else ())
    found = [next(known, None) if item in served.catalogue.index_of else None for item in query.items]
    return ScoreAnswer(
        known=user.is_known,
        unknown_items=user.unknown_items,
        items=[
            ScoredItem(item_id=item, score=None if value is None or np.isnan(value) else value)
            for item, value in zip(query.items, found, strict=True)
        ],
        served=origin(served),
    )


def shown_items(served: Served, indices: NDArray, scores: NDArray[np.float32] | None) -> list[Item]:
    """The items as answers show them, in the order of `indices`; index 0 is left out, and a score of NaN is null."""
    ids, titles = served.catalogue.ids, served.catalogue.titles
    values = [None] * len(indices) if scores is None else [None if np.isnan(s) else s for s in scores.tolist()]
    return [
        Item(item_id=ids[index - 1], title=titles[index - 1], score=value)
        for index, value in zip(indices.tolist(), values, strict=True)
        if index
    ]


def origin(served: Served) -> Origin:
    """The release and the night that answer."""
    return Origin(release=served.target.release, night=served.target.night or None)
