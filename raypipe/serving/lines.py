"""What replicas say, to Ray's log files: lines of JSON, as those of a job's workers are."""

from __future__ import annotations

import logging
import sys

from raypipe.runtime.progress import JsonLines


def log_as_json(deployment: str) -> None:
    """From here on the service's lines of this process are JSON, each of this deployment; Ray's own are as Ray has them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(job="serve", deployment=deployment))
    log = logging.getLogger("raypipe.serving")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
