"""Writes the log lines of replicas to Ray's log files as JSON, like those of a job's workers."""

from __future__ import annotations

import logging
import sys

from raypipe.runtime.progress import JsonLines


def log_as_json(deployment: str) -> None:
    """Write the service's log lines of this process as JSON from now on, each with this `deployment`.

    Ray's own lines stay as they are.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(job="serve", deployment=deployment))
    log = logging.getLogger("raypipe.serving")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
