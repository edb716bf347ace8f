"""Bearer tokens of the online service: several, each with a name and revocable. Only their hashes are stored.

A token is 256 random bits, so its plain SHA-256 cannot be inverted. It is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from dataclasses import asdict, dataclass

from raypipe.errors import UsageError
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.store import Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX = "rp_"


@dataclass(frozen=True)
class Token:
    """A client's token: its hash and its rate limit.

    Each replica accepts `requests_per_s` requests a second from it, and at most `burst` at once.
    """

    name: str
    sha256: str
    requests_per_s: float
    burst: int
    created: float
    revoked: bool = False


class Tokens:
    """The tokens of a workspace, in `tokens/<name>.json`."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def make(self, name: str, requests_per_s: float, burst: int) -> str:
        """Make a token and return it as plain text; only its hash is stored.

        Raises UsageError if the name is taken or invalid.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is no name for a token.",
                "Use letters, digits, dots and dashes, 64 at most: for example shop-eu.",
            )
        secret = _PREFIX + secrets.token_urlsafe(32)
        token = Token(name, hash_of(secret), requests_per_s, burst, time.time())
        if not self.store.create(_path(name), canonical_json(asdict(token)).encode()):
            raise UsageError(
                f"There is a token {name} already.", "Choose another name; a revoked one is not used again."
            )
        return secret

    def revoke(self, name: str) -> Token:
        """Refuse this token from now on. Raises UsageError if there is no such token."""
        found = next((token for token in self.all() if token.name == name), None)
        if found is None:
            known = ", ".join(token.name for token in self.all()) or "none"
            raise UsageError(f"There is no token {name}.", f"There are: {known}.")
        token = Token(**{**asdict(found), "revoked": True})
        self.store.put(_path(name), canonical_json(asdict(token)).encode())
        return token

    def all(self) -> list[Token]:
        return [Token(**json.loads(self.store.read(entry.path))) for entry in self.store.list("tokens")]

    def valid(self) -> dict[str, Token]:
        """The tokens that are not revoked, by hash."""
        return {token.sha256: token for token in self.all() if not token.revoked}


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _path(name: str) -> str:
    return f"tokens/{name}.json"
