"""The command line: find the job, validate its config, run it, and end with one JSON line and an exit code.

Exit codes: 0 ok or nothing to do, 1 failed, 2 wrong usage or config, 3 a quality gate refused.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from raypipe import __version__
from raypipe.cli.options import parse_config
from raypipe.cli.webhook import notify
from raypipe.config import Config
from raypipe.errors import RaypipeError, UsageError
from raypipe.runtime.progress import say, speak

# Job → module, config class, function.
# A module is imported only when its job is named, because `raypipe status` should not wait for torch.
JOBS = {
    "dataset synthetic": ("raypipe.pipeline.dataset", "SyntheticJobConfig", "run_synthetic"),
    "ingest": ("raypipe.pipeline.ingest", "IngestConfig", "run_ingest"),
    "lm": ("raypipe.pipeline.lm", "LmConfig", "run_lm"),
    "train": ("raypipe.pipeline.train", "TrainConfig", "run_train"),
    "evaluate": ("raypipe.pipeline.evaluate", "EvaluateConfig", "run_evaluate"),
    "release": ("raypipe.pipeline.release", "ReleaseConfig", "run_release"),
    "extract": ("raypipe.pipeline.extract", "ExtractConfig", "run_extract"),
    "recommend": ("raypipe.pipeline.recommend", "RecommendConfig", "run_recommend"),
    "align": ("raypipe.pipeline.align", "AlignConfig", "run_align"),
    "summarize": ("raypipe.pipeline.summarize", "SummarizeConfig", "run_summarize"),
    "rerank": ("raypipe.pipeline.rerank", "RerankConfig", "run_rerank"),
    "explain": ("raypipe.pipeline.explain", "ExplainConfig", "run_explain"),
    "judge": ("raypipe.pipeline.judge", "JudgeConfig", "run_judge"),
    "report": ("raypipe.pipeline.report", "ReportConfig", "run_report"),
    "nightly": ("raypipe.pipeline.nightly", "NightlyConfig", "run_nightly"),
    "online": ("raypipe.pipeline.online", "OnlineConfig", "run_online"),
    "token": ("raypipe.serving.token", "TokenConfig", "run_token"),
    "serve": ("raypipe.serving.serve", "ServeConfig", "run_serve"),
    "plan": ("raypipe.pipeline.plan", "PlanConfig", "run_plan"),
    "status": ("raypipe.pipeline.status", "StatusConfig", "run_status"),
    "retry-rejected": ("raypipe.pipeline.retry", "RetryConfig", "run_retry"),
    "night": ("raypipe.pipeline.night", "NightConfig", "run_night"),
    "vacuum": ("raypipe.pipeline.vacuum", "VacuumConfig", "run_vacuum"),
    "rebucket": ("raypipe.pipeline.rebucket", "RebucketConfig", "run_rebucket"),
    "forget": ("raypipe.pipeline.forget", "ForgetConfig", "run_forget"),
    "doctor": ("raypipe.pipeline.doctor", "DoctorConfig", "run_doctor"),
}
_SUBMIT = "submit"
# The descriptions in the list of jobs.
_PURPOSES = {
    "Logs and models": {
        "dataset synthetic": "make a log and a catalogue of any size, with planted tastes",
        "ingest": "take a log and its catalogue into the workspace",
        "lm": "train the workspace's own small language model",
        "train": "train a recommender",
        "align": "join a recommender and a language model, by a published system",
        "evaluate": "measure a recommender on every user's last event",
        "judge": "rate a sample of summaries or explanations",
        "report": "write everything that was measured on one page",
        "release": "put a recommender in force, or an earlier release",
    },
    "Everybody's rows": {
        "nightly": "a whole night: ingest, train, judge, recommend, summarise, publish",
        "extract": "write every user's hidden state",
        "recommend": "write every user's best items",
        "rerank": "order everybody's recommendations by a language model",
        "summarize": "write a summary of every user whose history changed",
        "explain": "write why a recommendation fits its user",
    },
    "Service": {
        "online": "load the night in force into the online store",
        "serve": "answer over HTTP until it is stopped",
        "token": "make or revoke a bearer token",
    },
    "Operations": {
        "doctor": "check the machine before the first night",
        "plan": "tell users, calls, tokens and hours before they are spent",
        "status": "tell open runs, tables, rejects and the night in force",
        "night": "list nights, or put an earlier one back in force",
        "retry-rejected": "take rejected rows and users again",
        "forget": "remove users everywhere, for good",
        "vacuum": "delete what nothing needs any more",
        "rebucket": "split the user buckets of a workspace that grew",
        "submit": "run a job on a cluster and follow it to its end",
    },
}
_EXIT = {"ok": 0, "nothing_to_do": 0, "failed": 1, "refused": 3}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job and return its exit code. The last line of stdout is the job's JSON, whatever happened."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help"}:
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    # A job's name is one word or two, such as `dataset synthetic`.
    length = 2 if " ".join(words[:2]) in JOBS else 1
    job, options = " ".join(words[:length]), words[length:]
    signal.signal(signal.SIGTERM, _stop)
    webhook: str | None = None
    try:
        if job == _SUBMIT:
            from raypipe.cli.submit import run_submit

            code, result = run_submit(options, JOBS, config_type)
        elif job in JOBS:
            config = parse_config(job, config_type(job), options)
            webhook = getattr(config, "webhook", None)
            speak(getattr(config, "logs", "text"), job=job)
            with _lease(config):
                result = _run(job, config)
            code = _EXIT[result["status"]]
        else:
            raise UsageError(f"There is no job {job!r}.", f"The jobs are {', '.join([*JOBS, _SUBMIT])}.")
    except RaypipeError as error:
        _tell(f"{error.problem} {error.remedy}")
        result, code = _failure(job, "refused" if error.exit_code == 3 else "failed", str(error)), error.exit_code
    except KeyboardInterrupt:
        _tell("Stopped. What is finished is kept: submit the same command again and it goes on from there.")
        result, code = _failure(job, "failed", "stopped"), 1
    except Exception as error:
        traceback.print_exc()
        _tell(
            f"{job} failed: {error!r}. This is a defect in raypipe or in the machine. Nothing published is harmed; "
            "submit the same command again to resume, and report the traceback above if it fails again."
        )
        result, code = _failure(job, "failed", repr(error)), 1
    # JSON has no NaN, so such a figure becomes null.
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)
    sys.stdout.flush()
    print(json.dumps(result, ensure_ascii=False), flush=True)
    if webhook is not None:
        with contextlib.suppress(KeyboardInterrupt):  # the job has ended; the webhook may be interrupted
            notify(webhook, result)
    return code


def config_type(job: str) -> type[Config]:
    """The configuration class of a job."""
    module, config, _ = JOBS[job]
    found: type[Config] = getattr(importlib.import_module(module), config)
    return found


def _lease(config: Config) -> contextlib.AbstractContextManager[object]:
    """The lock that a submitted run's driver holds while it lives, so that the run has only one driver."""
    run = getattr(config, "run", None)
    if run is None:
        return contextlib.nullcontext()
    from raypipe.storage.locks import run_lock
    from raypipe.storage.store import Store

    return run_lock(Store(config.workspace), run, config.lock_lease_s)  # type: ignore[attr-defined]


def _run(job: str, config: Config) -> dict[str, Any]:
    module, _, function = JOBS[job]
    result: dict[str, Any] = getattr(importlib.import_module(module), function)(config).to_dict()
    return result


def _failure(job: str, status: str, error: str) -> dict[str, Any]:
    return {
        "job": job,
        "status": status,
        "run_key": "",
        "tables": {},
        "models": {},
        "metrics": {},
        "cost": {},
        "error": error,
    }


def _tell(paragraph: str) -> None:
    say("raypipe: " + paragraph, "error")


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _usage() -> str:
    wide = max(map(len, JOBS))
    lines = ["usage: raypipe JOB [--config FILE] [--section.key value …]"]
    for group, purposes in _PURPOSES.items():
        lines += ["", f"{group}:", *(f"  {job:<{wide}}  {purpose}" for job, purpose in purposes.items())]
    return "\n".join([*lines, "", "`raypipe JOB --help` lists a job's options."])


if __name__ == "__main__":
    sys.exit(main())
