"""Requests that are wrong in every part cost no more than those that are wrong once."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raypipe.serving import queries
from raypipe.serving.queries import ExplainBatch, RecommendBatch, RecommendQuery, RerankQuery, ScoreQuery, UserOrHistory

MANY = 50_000
_MOST_ERRORS = 50
WRONG: list[tuple[type[Any], dict[str, Any], str]] = [
    (RecommendQuery, {"history": [1] * MANY}, "history.0"),
    (RecommendQuery, {"user_id": "u1", "deny": [None] * MANY}, "deny.0"),
    (ScoreQuery, {"user_id": "u1", "items": [""] * MANY}, "items.0"),
    (RerankQuery, {"user_id": "u1", "items": [{}] * MANY}, "items.0"),
    (RecommendBatch, {"queries": [{}] * MANY}, "queries.0"),
    (ExplainBatch, {"queries": [{"user_id": "u1"}] + [7] * MANY}, "queries.1"),
    (RecommendQuery, {f"key{number}": 1 for number in range(MANY)}, ""),
    (RecommendBatch, {"queries": [{f"key{number}": 1 for number in range(MANY)}]}, "queries.0"),
    (RecommendQuery, {"user_id": "u1", "only": {f"key{number}": 1 for number in range(MANY)}}, "only"),
]


@pytest.mark.parametrize(("kind", "body", "place"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_request_that_is_wrong_in_every_part_makes_few_errors(
    kind: type[Any], body: dict[str, Any], place: str
) -> None:
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert error.value.error_count() <= _MOST_ERRORS
    assert place in {".".join(map(str, found["loc"])) for found in error.value.errors()}


def test_every_list_and_object_of_a_request_is_among_them() -> None:
    kinds = [kind for kind in vars(queries).values() if isinstance(kind, type) and issubclass(kind, queries._Query)]
    assert {"RecommendQuery", "NextBatch"} <= {kind.__name__ for kind in kinds}
    wrong = {"list": [object()] * MANY, "dict": {f"key{number}": object() for number in range(MANY)}}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            for container, value in wrong.items():
                if container in str(field.annotation):
                    with pytest.raises(ValidationError) as error:
                        kind.model_validate({name: value})
                    assert error.value.error_count() <= _MOST_ERRORS, (kind, name)


def test_right_requests_are_as_long_as_their_limits_let_them_be() -> None:
    history = [f"i{number}" for number in range(MANY)]
    assert UserOrHistory.model_validate({"history": history}).history == history
    query = RecommendQuery.model_validate({"history": history, "deny": history, "only": {"genre": "War"}})
    assert (query.history, query.deny, query.only) == (history, history, {"genre": "War"})
    batch = RecommendBatch.model_validate({"queries": [{"user_id": f"u{number}"} for number in range(300)]})
    assert [one.user_id for one in batch.queries] == [f"u{number}" for number in range(300)]
