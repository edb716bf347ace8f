"""`raypipe submit JOB …`: check a job's command here, and run it through a cluster's job server.

A run is named `<job>-<date>-<run key>`, and its submissions `…-1`, `…-2`. The run key is a hash over the job and its
configuration, except for where it runs and with how many workers. So a run that succeeded or whose driver lives is not
submitted twice, and a run that failed continues where it stopped.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from raypipe.cli.options import option, parse_config
from raypipe.config import Config, free
from raypipe.errors import RaypipeError, UsageError
from raypipe.runtime.job import JobConfig
from raypipe.runtime.job_server import Attempt, Ended, JobServer, check_upload
from raypipe.runtime.progress import say
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.locks import run_lock
from raypipe.storage.store import Store

JOB = "submit"
NO_FOLDER = "none"
_FAILED = 1
_CONFIG_KEY_DIGITS = 12
# The time from a job's start until its driver must hold the lease: Python, imports and a worker node's start take time.
_LEASE_BY_S = 180.0
_INSTALLS = ("pip", "conda", "uv")
_TOKEN = "token"
_WHERE = frozenset(JobConfig.model_fields) - {"workspace"}


class SubmitConfig(Config):
    """Where a job is submitted, and the resources of its driver."""

    address: str = free(
        lambda: os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265", "the cluster's job server"
    )
    working_dir: str = free(
        ".", f"folder that is uploaded, 100 MiB at most; {NO_FOLDER!r}: the nodes have what is needed"
    )
    runtime_env: str | None = free(None, "YAML file of Ray's runtime environment: env_vars, pip, excludes, …")
    owner: str = free(lambda: getpass.getuser(), "who answers for the run")
    driver_cpus: float = free(1.0, "CPUs of the driver; with a head of --num-cpus 0 they keep it off the head", gt=0)
    driver_memory: int | None = free(None, "bytes reserved for the driver", ge=1)
    driver_resources: dict[str, float] = free(dict, "custom resources of the driver, as JSON")
    again: bool = free(False, "also where this run succeeded before")
    wait: bool = free(True, "show what the job prints and end as it ends")
    dry_run: bool = free(False, "print what would be submitted, and submit nothing")


class Submission(Config):
    """What is submitted, without the number of the attempt."""

    job: str = free(..., "the job")
    words: tuple[str, ...] = free(..., "the job's options, its date among them")
    typed: tuple[str, ...] = free(..., "the same as they are typed here, where the config file has another path")
    date: str = free(..., "the run's date")
    config_key: str = free(..., "hash over the job and its configuration, but for where it runs")
    config_hash: str = free(..., "hash over all of the configuration")
    workspace: str = free(..., "the workspace")

    @property
    def run(self) -> str:
        return f"{self.job.replace(' ', '-')}-{self.date}-{self.config_key}"

    def entrypoint(self, driver_cpus: float) -> str:
        """The command that the job server runs: the job, under the run's lease."""
        added = ("--run", self.run, "--cluster.driver_cpus", f"{driver_cpus:g}")
        return shlex.join(["python", "-m", "raypipe.cli.main", *self.job.split(), *self.words, *added])


def run_submit(
    words: Sequence[str], jobs: Collection[str], config_type: Callable[[str], type[Config]]
) -> tuple[int, dict[str, Any]]:
    """Submit the job that `words` name, one of `jobs`. Returns its exit code and result.

    Raises UsageError if the job or its options are wrong, if the run succeeded or is running, or if the upload is too
    large.
    """
    own, rest = split_words(words)
    config = parse_config(JOB, SubmitConfig, own)
    submission = prepare(config, rest, jobs, config_type)
    runtime_env = _runtime_env(config)
    resources = _resources(config)
    again = shlex.join(["raypipe", JOB, *own, *submission.job.split(), *submission.typed])
    if config.dry_run:
        shown = {"run": submission.run, "entrypoint": submission.entrypoint(config.driver_cpus)}
        return 0, _result(
            submission,
            "ok",
            {**shown, "runtime_env": runtime_env, **resources, "metadata": _metadata(config, submission)},
        )
    server = JobServer(config.address)
    number = next_attempt(server.attempts(submission.run), submission, config)
    submission_id = f"{submission.run}-{number}"
    server.submit(
        submission_id,
        submission.entrypoint(config.driver_cpus),
        runtime_env,
        {**_metadata(config, submission), "attempt": str(number)},
        **resources,
    )
    say(f"{JOB}: {submission_id} is submitted to {config.address}")
    say(f"{JOB}: to resume it after a failure: {again}")
    facts = {"submission_id": submission_id, "attempt": number}
    if not config.wait:
        say(f"{JOB}: to follow it: ray job logs --follow --address {config.address} {submission_id}")
        return 0, _result(submission, "ok", facts)
    try:
        ended = server.follow(submission_id, lambda text: print(text, end="", file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        raise RaypipeError(
            f"{submission_id} is watched no longer; it runs on.",
            f"`ray job logs --follow --address {config.address} {submission_id}` shows it, and `ray job stop` ends it.",
        ) from None
    return _conclude(submission, ended, facts, again)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Submit's own options, and the rest from the job's name on."""
    flags = {
        f"--{sign}{name}"
        for name, field in SubmitConfig.model_fields.items()
        for sign in ("", "no-")
        if field.annotation is bool
    }
    place = 0
    while place < len(words) and words[place].startswith("-"):
        place += 1 if "=" in words[place] or words[place] in {*flags, "-h", "--help"} else 2
    return list(words[:place]), list(words[place:])


def prepare(
    config: SubmitConfig, words: Sequence[str], jobs: Collection[str], config_type: Callable[[str], type[Config]]
) -> Submission:
    """What will be submitted, checked by the job's own configuration class.

    Raises UsageError if it cannot be submitted.
    """
    length = 2 if " ".join(words[:2]) in jobs else 1
    job, options = " ".join(words[:length]), list(words[length:])
    if job not in jobs:
        raise UsageError(
            f"There is no job {job!r} to submit." if job else "No job is named.",
            f"Write `raypipe {JOB} [--address URL] JOB …`; the jobs are {', '.join(jobs)}.",
        )
    if not issubclass(config_type(job), JobConfig):
        raise UsageError(f"{job} is no job that ends.", "Deploy the service with `serve deploy cluster/serve.yaml`.")
    if job == _TOKEN:
        raise UsageError(
            "A token that a submitted job makes would stand in the cluster's logs.",
            "Run `raypipe token` here: all it needs is the workspace.",
        )
    parsed = parse_config(job, config_type(job), options)
    date = getattr(parsed, "date", None) or datetime.date.today().isoformat()
    if job == "nightly" and parsed.date is None:  # type: ignore[attr-defined]
        # A night that is tried again after midnight must remain the same night.
        options += ["--date", date]
        parsed = parse_config(job, config_type(job), options)
    values = parsed.model_dump(mode="json")
    what = {name: value for name, value in values.items() if name not in _WHERE}
    return Submission(
        job=job,
        words=tuple(_in_working_dir(options, config)),
        typed=tuple(options),
        date=date,
        config_key=fingerprint({"job": job, "config": what})[:_CONFIG_KEY_DIGITS],
        config_hash=fingerprint(values),
        workspace=values["workspace"],
    )


def next_attempt(attempts: Sequence[Attempt], submission: Submission, config: SubmitConfig) -> int:
    """The number of the next attempt. Raises UsageError if the run succeeded or if an attempt may be alive."""
    if any(attempt.status == "SUCCEEDED" for attempt in attempts) and not config.again:
        raise UsageError(
            f"{submission.run} has succeeded.",
            "There is nothing to resume; to run it once more all the same, add --again.",
        )
    for attempt in attempts:
        if attempt.status == "PENDING" or (attempt.status == "RUNNING" and _is_alive(attempt, submission)):
            raise UsageError(
                f"{attempt.submission_id} is {attempt.status.lower()}.",
                f"Follow it: `ray job logs --follow --address {config.address} {attempt.submission_id}`; or end it with "
                "`ray job stop` and submit again.",
            )
    return max((attempt.number for attempt in attempts), default=0) + 1


def _is_alive(attempt: Attempt, submission: Submission) -> bool:
    """Whether a driver holds the run's lease.

    Ray's status is not enough: a head that died leaves its jobs RUNNING for ever.
    """
    if time.time() - attempt.started < _LEASE_BY_S:
        return True
    store = Store(submission.workspace)
    if store.is_local and not store.local_path().is_dir():
        # The workspace is a folder of the cluster and not of this machine, so its lease cannot be seen.
        return True
    try:
        with run_lock(store, submission.run):
            say(f"{JOB}: {attempt.submission_id} is called running, but no driver holds its lease: its cluster died")
    except RaypipeError:
        return True
    return False


def _in_working_dir(options: Sequence[str], config: SubmitConfig) -> list[str]:
    """The options, with the config file's path relative to the working directory."""
    file = option(options, "--config")
    if file is None or config.working_dir == NO_FOLDER:
        return list(options)
    folder, path = Path(config.working_dir).resolve(), Path(file).resolve()
    if not path.is_relative_to(folder):
        raise UsageError(
            f"The config file {file} is not in the working directory {config.working_dir}, so the cluster would not have it.",
            "Put it there, or name the folder that holds it with --working_dir.",
        )
    inside = path.relative_to(folder).as_posix()
    return [inside if word == file else word.replace(f"--config={file}", f"--config={inside}") for word in options]


def _runtime_env(config: SubmitConfig) -> dict[str, Any]:
    env: dict[str, Any] = {}
    if config.runtime_env is not None:
        try:
            env = yaml.safe_load(Path(config.runtime_env).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(
                f"The runtime environment {config.runtime_env} cannot be read: {error}.", "Write YAML."
            ) from None
    if any(name in env for name in _INSTALLS):
        # Ray Train waits half a minute for its workers to start, and the installation of packages counts towards that.
        env["env_vars"] = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600", **env.get("env_vars", {})}
    if config.working_dir != NO_FOLDER:
        size = check_upload(Path(config.working_dir), env.get("excludes", []))
        say(f"{JOB}: the working directory {config.working_dir} holds {size / 2**20:.1f} MiB")
        env["working_dir"] = config.working_dir
    return env


def _resources(config: SubmitConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"entrypoint_num_cpus": config.driver_cpus}
    if config.driver_memory is not None:
        found["entrypoint_memory"] = config.driver_memory
    if config.driver_resources:
        found["entrypoint_resources"] = config.driver_resources
    return found


def _metadata(config: SubmitConfig, submission: Submission) -> dict[str, str]:
    return {
        "job": submission.job,
        "run": submission.run,
        "workspace": submission.workspace,
        "owner": config.owner,
        "config_hash": submission.config_hash,
        "git_sha": _git_sha("." if config.working_dir == NO_FOLDER else config.working_dir),
    }


def _git_sha(folder: str) -> str:
    """The commit of the folder, marked "-dirty" if files differ from it; "none" outside of git."""
    try:
        sha = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run(
            ["git", "-C", folder, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return sha.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def _conclude(submission: Submission, ended: Ended, facts: dict[str, Any], again: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the result of a job that has ended."""
    code = 0 if ended.status == "SUCCEEDED" else ended.exit_code or _FAILED
    code = code if code in (0, 2, 3) else _FAILED
    result = _last_json(ended.logs)
    facts = {**facts, "driver_exit_code": ended.exit_code, "result": result}
    status = result.get("status", "ok") if code == 0 else "refused" if code == 3 else "failed"
    if code:
        why = result.get("error") or (ended.message.strip().splitlines() or [ended.status])[0]
        say(f"raypipe: {facts['submission_id']} ended {status}: {why}")
        say(f"raypipe: to resume: {again}")
        return code, {**_result(submission, status, facts), "error": why}
    return code, _result(submission, status, facts)


def _last_json(logs: str) -> dict[str, Any]:
    for line in reversed(logs.strip().splitlines()):
        if line.startswith("{"):
            try:
                return dict(json.loads(line))
            except ValueError:
                return {}
    return {}


def _result(submission: Submission, status: str, facts: dict[str, Any]) -> dict[str, Any]:
    job = facts.get("result", {})
    return {
        "job": JOB,
        "status": status,
        "run_key": job.get("run_key", ""),
        "tables": job.get("tables", {}),
        "models": job.get("models", {}),
        "metrics": {"run": submission.run, **facts},
        "cost": job.get("cost", {}),
    }
