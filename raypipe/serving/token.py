"""`raypipe token`: make, list and revoke the tokens of the online service."""

from __future__ import annotations

from raypipe.config import free
from raypipe.errors import UsageError
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.storage.tokens import Tokens

JOB = "token"


class TokenConfig(JobConfig):
    """Configuration of `token`."""

    name: str | None = free(None, "who gets a new token; unset: list those there are")
    revoke: str | None = free(None, "whose token is refused from now on")
    requests_per_s: float = free(100.0, "requests a second that a replica takes from it", gt=0)
    burst: int = free(200, "requests it may send at once", ge=1)


def run_token(config: TokenConfig) -> JobResult:
    """Make, list or revoke tokens. A new token is in the result and nowhere else: only its hash is stored.

    Raises UsageError if both `name` and `revoke` are given.
    """
    workspace = config.open_workspace()
    workspace.require_info()
    tokens = Tokens(workspace.store)
    if config.name is not None and config.revoke is not None:
        raise UsageError("Both --name and --revoke are given.", "Do one after the other.")
    if config.name is not None:
        secret = tokens.make(config.name, config.requests_per_s, config.burst)
        say(f"{JOB}: this is shown once; keep it where secrets are kept")
        return JobResult(JOB, "ok", metrics={"name": config.name, "token": secret})
    if config.revoke is not None:
        tokens.revoke(config.revoke)
        return JobResult(JOB, "ok", metrics={"revoked": config.revoke})
    for token in tokens.all():
        say(f"{token.name}   {token.requests_per_s:g}/s{'   revoked' if token.revoked else ''}")
    return JobResult(JOB, "ok", metrics={"tokens": [token.name for token in tokens.all() if not token.revoked]})
