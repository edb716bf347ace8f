"""What every job shares: where it works, and the JSON object that it ends with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raypipe.config import Config, free
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.progress import LogFormat, say
from raypipe.storage.models import Model, Models
from raypipe.storage.tracking import Tracking
from raypipe.storage.workspace import Workspace


class JobConfig(Config):
    """The part of a job's configuration that says where it runs, not what it computes."""

    workspace: str = free("./workspace", "workspace folder or s3:// URI")
    tracking: Literal["auto", "off"] = free("auto", "MLflow: MLFLOW_TRACKING_URI or the workspace's own, or off")
    cluster: ClusterConfig = free(ClusterConfig, "the Ray cluster and its workers")
    webhook: str | None = free(None, "URL that gets the job's JSON result by POST, however it ends")
    lock_lease_s: float = free(60.0, "lease of the table locks on an object store, in seconds", gt=0)
    logs: LogFormat = free("text", "lines on stderr: text, or json with time, level, job, run key and unit")
    run: str | None = free(
        None, "the submitted run whose lease this job holds; `raypipe submit` names it", pattern="^[a-z0-9-]+$"
    )

    def open_workspace(self) -> Workspace:
        return Workspace(self.workspace)

    def open_tracking(self, workspace: Workspace) -> Tracking:
        return Tracking(workspace.store, self.tracking, say)


class ModelCache(Config):
    """The model cache of jobs that read stored models."""

    model_cache: str = free(
        str(Path(tempfile.gettempdir()) / "raypipe-models"), "where models of a remote workspace are kept"
    )

    def fetch(self, workspace: Workspace, model: Model) -> Path:
        """The model's checkpoint folder on this machine."""
        return Models(workspace.store).fetch(model, Path(self.model_cache))


@dataclass(frozen=True)
class JobResult:
    """How a job ended. Its JSON is the last line of stdout.

    `intervals` maps names of metrics to the half-widths of their 95 % intervals over users, for the metrics that have
    one.
    """

    job: str
    status: str
    run_key: str = ""
    tables: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        told = asdict(self)
        if not self.intervals:
            del told["intervals"]
        return told

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> JobResult:
        return JobResult(**raw)
