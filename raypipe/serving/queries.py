"""The types of requests and answers, whose schemas /docs shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_MOST_KEYS = 32  # of an object in a request; no type has as many fields


def _few_keys(values: Any) -> Any:
    # Pydantic reports every wrong key, and without `fail_fast` every wrong element of a list. For a body of a megabyte
    # that takes half a gigabyte of errors, and seconds.
    if isinstance(values, Mapping) and len(values) > _MOST_KEYS:
        raise ValueError(f"has {len(values):,} keys, and {_MOST_KEYS} are the most")
    return values


ItemId = Annotated[str, Field(min_length=1, max_length=512)]
UserId = Annotated[str, Field(min_length=1, max_length=512)]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _fields(cls, values: Any) -> Any:
        return _few_keys(values)


class UserOrHistory(_Query):
    """The user or history that a query is about: give one of the two.

    `user_id` is a user of the night that is served; `history` are item ids, the newest last.
    """

    user_id: UserId | None = None
    history: list[ItemId] | None = Field(None, fail_fast=True)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give user_id or history, one of the two")
        return self


class RecommendQuery(UserOrHistory):
    """Asks for the best items.

    The list holds no unavailable or denied items and none of `deny`; every item in it has the attribute values of
    `only`.
    """

    count: int = Field(10, ge=1)
    only: Annotated[dict[str, str], BeforeValidator(_few_keys)] = Field(
        default_factory=dict, max_length=16, description="attribute → value every item must have"
    )
    deny: list[ItemId] = Field(
        default_factory=list, fail_fast=True, description="item ids that must not be in the list"
    )
    filter_seen: bool | None = Field(None, description="nothing of the history; unset: as the service is set up")


class ScoreQuery(UserOrHistory):
    """Asks for the recommender's scores of items. Scores can be compared only within one user or history."""

    items: list[ItemId] = Field(min_length=1, fail_fast=True)


class SummaryQuery(UserOrHistory):
    """Asks for a summary: of a user, what the night wrote; of a history, what the language model writes now."""


class ExplainQuery(UserOrHistory):
    """Asks why an item fits a user or history, or why it does not."""

    item_id: ItemId | None = Field(None, description="unset: the one that is recommended first")
    adapter: str | None = Field(None, max_length=200, description="of the release, by name; unset: its first")
    focus: str = Field("", max_length=100, description="what to attend to, for example genres")


class _Reading(UserOrHistory):
    adapter: str | None = Field(None, max_length=200, description="of the release, by name; unset: its first")


class InterpretQuery(_Reading):
    """Asks for the titles that a language model reads from the recommender's state alone."""


class ResidualQuery(_Reading):
    """Asks for the title that a language model reads from the states before and after the last event."""


class OracleQuery(_Reading):
    """Asks for the title that a language model reads from the oracle: the item vector the recommender expects next."""


class RerankQuery(UserOrHistory):
    """Asks a language model to put items in order.

    It reads the items, the last items of the history, and a summary of the user if there is one.
    """

    items: list[ItemId] | None = Field(None, min_length=1, fail_fast=True, description="unset: the recommender's best")
    count: int = Field(10, ge=1, description="of the recommender's best, where no items are given")
    adapter: str | None = Field(None, max_length=200, description="of the release, by name; unset: its first")


class NextQuery(RecommendQuery):
    """Asks for the items that a language model writes as the next ones, under the conditions of a recommendation."""

    adapter: str | None = Field(None, max_length=200, description="of the release, by name; unset: its first")


class Item(BaseModel):
    item_id: str
    title: str
    score: float | None = Field(description="of the recommender; null where the item is listed for being popular")


class Origin(BaseModel):
    """Which release answered, and which night's users it knows."""

    release: str
    night: str | None


class RecommendAnswer(BaseModel):
    """Recommended items, best first.

    `basis` is `popular` if the recommender knows nothing of the user or history; `known` is true if the night has the
    user.
    """

    basis: Literal["model", "popular"]
    known: bool
    unknown_items: int = Field(description="items of the history that are not in the catalogue; they are left out")
    items: list[Item]
    served: Origin


class ScoredItem(BaseModel):
    item_id: str
    score: float | None = Field(description="null for an item or a user the recommender does not know")


class ScoreAnswer(BaseModel):
    known: bool
    unknown_items: int
    items: list[ScoredItem]
    served: Origin


class SummaryAnswer(BaseModel):
    """Summaries, by paradigm. `user_id` is null if the query gave a history."""

    user_id: str | None
    unknown_items: int = 0
    summaries: dict[str, str]
    served: Origin


class AdapterAnswer(BaseModel):
    """What every answer of an adapter holds."""

    known: bool
    unknown_items: int
    adapter: str
    served: Origin


class ExplainAnswer(AdapterAnswer):
    """Whether the item fits (`decision`) and why (`text`), as the language model understood the recommender."""

    item: Item
    decision: Literal["yes", "no"]
    text: str


class InterpretAnswer(AdapterAnswer):
    """The `titles` that the language model named and the `history` it should have named, both oldest first.

    If the adapter learnt each title as an answer of its own, `titles` are likeliest first.
    """

    titles: list[str]
    history: list[str]
    text: str


class TitleAnswer(AdapterAnswer):
    """The `title` that the language model named, null if the catalogue has no such title.

    `expected` is the title it should have named.
    """

    title: str | None
    expected: str
    text: str


class RerankedItem(BaseModel):
    item_id: str
    title: str
    score: float | None = Field(description="how likely yes is, from 0 to 1; null for what is not in the catalogue")


class RerankAnswer(AdapterAnswer):
    """Items, best first; those that are not in the catalogue come last."""

    items: list[RerankedItem]


class NextItem(BaseModel):
    item_id: str
    title: str
    score: float = Field(description="log-probability of what was written and taken for the item")


class NextAnswer(AdapterAnswer):
    """Items, best first; at most as many as the language model writes lines."""

    items: list[NextItem]


class User(BaseModel):
    """What the night knows of a user.

    `history` holds the last items of the user's `events`, newest last; `recommended` is the night's own list.
    """

    user_id: str
    events: int
    history: list[Item]
    summaries: dict[str, str]
    recommended: list[Item]
    served: Origin


class Users(BaseModel):
    """Ids of some users of the night, not of all."""

    users: list[str]
    served: Origin


class Problem(BaseModel):
    """Why there is no answer: `code` is for programs, `message` for people."""

    code: str
    message: str


class Failure(BaseModel):
    error: Problem
    request_id: str


class RecommendBatch(_Query):
    queries: list[RecommendQuery] = Field(min_length=1, fail_fast=True)


class ScoreBatch(_Query):
    queries: list[ScoreQuery] = Field(min_length=1, fail_fast=True)


class ExplainBatch(_Query):
    queries: list[ExplainQuery] = Field(min_length=1, fail_fast=True)


class InterpretBatch(_Query):
    queries: list[InterpretQuery] = Field(min_length=1, fail_fast=True)


class ResidualBatch(_Query):
    queries: list[ResidualQuery] = Field(min_length=1, fail_fast=True)


class OracleBatch(_Query):
    queries: list[OracleQuery] = Field(min_length=1, fail_fast=True)


class SummaryBatch(_Query):
    queries: list[SummaryQuery] = Field(min_length=1, fail_fast=True)


class RerankBatch(_Query):
    queries: list[RerankQuery] = Field(min_length=1, fail_fast=True)


class NextBatch(_Query):
    queries: list[NextQuery] = Field(min_length=1, fail_fast=True)


class RecommendAnswers(BaseModel):
    """Answers in the order of the queries. A query that cannot be answered has a problem in place of its answer."""

    answers: list[RecommendAnswer | Problem]


class ScoreAnswers(BaseModel):
    answers: list[ScoreAnswer | Problem]


class ExplainAnswers(BaseModel):
    answers: list[ExplainAnswer | Problem]


class InterpretAnswers(BaseModel):
    answers: list[InterpretAnswer | Problem]


class TitleAnswers(BaseModel):
    answers: list[TitleAnswer | Problem]


class RerankAnswers(BaseModel):
    answers: list[RerankAnswer | Problem]


class NextAnswers(BaseModel):
    answers: list[NextAnswer | Problem]


class SummaryAnswers(BaseModel):
    answers: list[SummaryAnswer | Problem]


class ReleaseStatus(BaseModel):
    """What is served, and why other releases and nights are not.

    `since`: Unix seconds. `adapters`: name → system. `night_behind`: the night in force, or its latest publication, is
    not the one that is served. `refused`: why a release, or a night (as `night DATE`), is not served. `held_back`: the
    same for a failure that may pass; what failed is tried again.
    """

    release: str
    recommender: str
    lm: str | None
    adapters: dict[str, str]
    items: int
    night: str | None
    night_in_force: str | None
    night_behind: bool
    since: float
    refused: dict[str, str]
    held_back: dict[str, str]


class HealthStatus(BaseModel):
    ok: bool
    reason: str = ""
