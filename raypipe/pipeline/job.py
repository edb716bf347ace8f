"""What batch jobs share: their users, what they may spend, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import field_validator, model_validator

from raypipe.config import Config, free
from raypipe.data.id_lists import read_ids
from raypipe.errors import UsageError
from raypipe.runtime.budget import Limits
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import stable_hash
from raypipe.storage.ledger import WHOLE, Usage
from raypipe.storage.models import Model
from raypipe.storage.workspace import Workspace


def cost_of(usage: Usage, seconds: float) -> dict[str, float]:
    """The `cost` object of a result; `seconds` are the job's wall clock."""
    return {
        "seconds": round(seconds, 3),
        "calls": usage.calls,
        "tokens_in": usage.tokens_in,
        "tokens_out": usage.tokens_out,
    }


def model_result(
    job: str, model: Model, status: str, metrics: Mapping[str, Any], started: float, usage: Usage | None = None
) -> JobResult:
    """The result of a job that trains or measures a model.

    `started` is on the monotonic clock. `usage` is what asking the model took, None if nothing was counted.
    """
    cost = cost_of(usage or Usage(), time.monotonic() - started)
    return JobResult(job, status, model.recipe, models={model.name: model.hash}, metrics=metrics, cost=cost)


class CapOptions(Config):
    """What a job may spend at most, what spending costs, and how much may go wrong."""

    max_calls: int | None = free(None, "hard cap on model calls", ge=0)
    max_tokens: int | None = free(None, "hard cap on tokens, in and out together", ge=0)
    max_cost: float | None = free(None, "hard cap on money, by the prices, of which one has to be given", ge=0)
    deadline: datetime | None = free(
        None, "no new work after this moment: ISO time with its UTC offset, for example 2026-01-06T05:30:00+01:00"
    )
    max_reject_rate: float = free(
        0.2, "share of the rows read so far whose rejection stops the run; what is done stays done", ge=0, le=1
    )
    price_in: float = free(0.0, "price of a million prompt tokens", ge=0)
    price_out: float = free(0.0, "price of a million generated tokens", ge=0)

    @field_validator("deadline")
    @classmethod
    def _is_one_moment(cls, deadline: datetime | None) -> datetime | None:
        if deadline is not None and deadline.tzinfo is None:
            raise ValueError(
                "without a UTC offset it is another moment on a machine of another time zone; write it with Z for UTC or with an "
                f"offset, as {deadline.isoformat()}+01:00"
            )
        return deadline

    @model_validator(mode="after")
    def _money_needs_a_price(self) -> CapOptions:
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise UsageError(
                f"A cap of {self.max_cost} on money is given and no price, so that nothing would ever count against it.",
                "Give --price_in and --price_out, the prices of a million tokens, beside --max_cost and with the same prefix; "
                "or cap --max_calls or --max_tokens.",
            )
        return self

    def limits(self) -> Limits:
        deadline = self.deadline.timestamp() if self.deadline is not None else None
        return Limits(self.max_calls, self.max_tokens, self.max_cost, deadline, self.price_in, self.price_out)

    def money(self, usage: Usage) -> float:
        return self.limits().money(usage)


class BatchConfig(JobConfig):
    """A job over many users, or over a canary of them."""

    users: str | None = free(None, "file of user ids, a line each: a canary of its own scope, never published")
    sample: int | None = free(None, "as `users`, for so many users chosen by hash", ge=1)

    def canary_users(self, workspace: Workspace) -> list[str] | None:
        """The canary's users, sorted; None for all.

        Raises UsageError if both options are given, and for a file that cannot be read, names nobody, or names users
        without a history.
        """
        if self.users is not None and self.sample is not None:
            raise UsageError("Both --users and --sample are given.", "Name the canary's users one way.")
        if self.users is not None:
            named = read_users(self.users)
            ids = pa.array(named, pa.string())
            is_known = pc.is_in(ids, value_set=_every_user(workspace))
            if strangers := ids.filter(pc.invert(is_known)).to_pylist():
                raise UsageError(
                    f"{len(strangers)} of {len(named)} users of {self.users} have no history, for example {strangers[0]!r}.",
                    "Check the file; ids are compared exactly.",
                )
            return named
        if self.sample is None:
            return None
        users = _every_user(workspace)
        chosen = np.argsort(stable_hash(users), kind="stable")[: self.sample]
        return sorted(users.take(pa.array(chosen)).to_pylist())


def scope_of(canary: list[str] | None) -> str:
    """The scope of a run over everybody, or over a canary's users."""
    return WHOLE if canary is None else fingerprint({"users": canary})


def read_users(path: str) -> list[str]:
    """The user ids of a file, one a line, sorted. Raises UsageError for a file that cannot be read or names nobody."""
    if not (users := sorted(read_ids(path, "users file"))):
        raise UsageError(f"The users file {path} names nobody.", "Write one user id a line.")
    return users


def _every_user(workspace: Workspace) -> pa.Array:
    table = workspace.tables["histories"]
    return table.read(table.version(), ["user_id"])["user_id"].combine_chunks()
