"""The webhook: tell a listener how a job ended."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from raypipe.runtime.progress import say

_TIMEOUT_S = 10.0
_SECRET = "token"
"""Among a result's metrics, what is for who asked alone."""


def notify(url: str, result: Mapping[str, Any]) -> None:
    """POST the job's result as JSON, without a token that the job made.

    If that fails, a warning on stderr says so, and nothing else changes.
    """
    metrics = {name: value for name, value in result["metrics"].items() if name != _SECRET}
    body = json.dumps({**result, "metrics": metrics}, ensure_ascii=False).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        say(f"raypipe: the webhook on {_host(url)} was not told ({reason}).", "warning")


def _host(url: str) -> str:
    """The host name of the URL. The rest of the address may be a secret."""
    try:
        return urlsplit(url).hostname or "no host"
    except ValueError:
        return "no host"
