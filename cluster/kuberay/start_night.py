"""Create the night's RayJob, wait for its end, and exit with its driver's code. The nightly CronJob runs this.

If it exits with 1, Kubernetes starts it anew, and it creates the next attempt. If it was evicted, it finds the attempt
that runs. Exit codes 2 (wrong configuration) and 3 (a quality gate refused) are final. It needs only Python, so that it
starts at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_FINAL = (2, 3)
_PATIENCE_S = 600.0


class Kubernetes:
    """The RayJobs of one namespace."""

    def __init__(self, url: str, account: Path, namespace: str) -> None:
        self._jobs = f"{url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account

    def of_night(self, night: str) -> list[dict[str, Any]]:
        """The attempts of a night, first to last."""
        selector = urllib.parse.quote(f"raypipe/night={night}")
        found = self._ask(f"{self._jobs}?labelSelector={selector}")["items"]
        return sorted(found, key=lambda job: int(job["metadata"]["labels"]["raypipe/attempt"]))

    def create(self, job: dict[str, Any]) -> None:
        """Create the job. It is no error if a job of that name exists already."""
        try:
            self._ask(self._jobs, json.dumps(job).encode())
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise

    def _ask(self, url: str, body: bytes | None = None) -> Any:
        # Read the token each time, because Kubernetes replaces it while a night runs.
        token = (self._account / "token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        trusted = self._account / "ca.crt"
        context = ssl.create_default_context(cafile=str(trusted)) if url.startswith("https:") else None
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return json.load(answer)


def attempt_of(manifest: dict[str, Any], night: str, attempt: int, date: str) -> dict[str, Any]:
    """The RayJob of one attempt at a night."""
    metadata = {name: value for name, value in manifest["metadata"].items() if name != "generateName"}
    labels = {**metadata.get("labels", {}), "raypipe/night": night, "raypipe/attempt": str(attempt)}
    spec = {**manifest["spec"], "entrypoint": f"{manifest['spec']['entrypoint']} --date {date}"}
    return {**manifest, "metadata": {**metadata, "name": f"{night}-{attempt}", "labels": labels}, "spec": spec}


def exit_code(job: dict[str, Any]) -> int | None:
    """The exit code of the job's driver: 1 if it is not known, None while it runs."""
    status = job.get("status", {})
    if status.get("jobDeploymentStatus") not in {"Complete", "Failed"}:
        return None
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    told = re.search(r"failed with exit code (\d+)", status.get("message", ""))
    return int(told[1]) if told else 1


def date_of(night: str) -> str:
    """The night's date.

    A CronJob puts the minute at which a job was due into its name; if started by hand, it is today.
    """
    due = night.rsplit("-", 1)[-1]
    moment = datetime.datetime.fromtimestamp(int(due) * 60) if re.fullmatch(r"\d{8}", due) else datetime.datetime.now()
    return moment.date().isoformat()


def run(kubernetes: Kubernetes, manifest: dict[str, Any], night: str, poll_s: float) -> int:
    """Wait for the newest attempt and return its exit code.

    If there is none, or it failed and may be tried again, create one.
    """
    attempts = kubernetes.of_night(night)
    code = exit_code(attempts[-1]) if attempts else 1
    if code is not None and code not in (0, *_FINAL):
        job = attempt_of(manifest, night, len(attempts) + 1, date_of(night))
        print(f"{job['metadata']['name']}: {job['spec']['entrypoint']}", flush=True)
        kubernetes.create(job)
        code = None
    answered = time.monotonic()
    while code is None:
        time.sleep(poll_s)
        try:
            attempts = kubernetes.of_night(night)
            answered = time.monotonic()
        except OSError as error:
            print(f"Kubernetes does not answer: {error}", flush=True)
            if time.monotonic() - answered > _PATIENCE_S:
                return 1
            continue
        code = exit_code(attempts[-1]) if attempts else 1
    print(f"{attempts[-1]['metadata']['name'] if attempts else night} ended with exit code {code}", flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--api", default="https://kubernetes.default.svc")
    parser.add_argument("--account", type=Path, default=_ACCOUNT)
    parser.add_argument("--poll_s", type=float, default=15.0)
    options = parser.parse_args()
    manifest = json.loads(options.manifest.read_text())
    kubernetes = Kubernetes(options.api, options.account, manifest["metadata"]["namespace"])
    try:
        return run(kubernetes, manifest, os.environ["NIGHT"], options.poll_s)
    except OSError as error:
        print(f"Kubernetes cannot be asked: {error}", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
