"""The night as an Airflow task: `raypipe submit` with the date for which Airflow runs it.

Copy this file into the DAGs folder of an Airflow whose workers have raypipe, and have RAY_API_SERVER_ADDRESS,
RAY_AUTH_MODE=token, RAY_AUTH_TOKEN and the workspace's AWS_* in their environment. A night that failed is submitted
again and continues where it stopped. A night whose configuration is wrong, or that a quality gate refused, is not.
"""

from __future__ import annotations

import datetime
import subprocess

from airflow.exceptions import AirflowFailException
from airflow.sdk import dag, task

CONFIG = "jobs/nightly.yaml"
WORKSPACE = "s3://example-bucket/raypipe"
PROJECT = "/opt/raypipe"
FINAL = {2: "the configuration is wrong, or this night runs or ran already", 3: "a quality gate refused"}


def command(date: str) -> list[str]:
    """The command that a person would type for the night of `date`."""
    return ["raypipe", "submit", "nightly", "--config", CONFIG, "--workspace", WORKSPACE, "--date", date]


def run_night(date: str) -> None:
    """Submit the night and wait for its end. Its log becomes the task's log."""
    code = subprocess.run(command(date), cwd=PROJECT, check=False).returncode
    if code in FINAL:
        raise AirflowFailException(f"The night of {date} ended with exit code {code}: {FINAL[code]}.")
    if code:
        raise RuntimeError(f"The night of {date} failed with exit code {code}; the next try resumes it.")


@dag(
    schedule="30 1 * * *",
    start_date=datetime.datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": datetime.timedelta(minutes=10)},
)
def raypipe_nightly() -> None:
    @task(execution_timeout=datetime.timedelta(hours=10))
    def night(ds: str = "") -> None:
        run_night(ds)

    night()


raypipe_nightly()
