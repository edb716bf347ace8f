"""MLflow beside the workspace: one MLflow run per run key, found again by its tag, and the model registry.

A local workspace keeps its own `mlflow.db` (SQLite, one machine). A workspace on an object store needs a tracking
server. A server that does not answer or a damaged database is only reported: what is published and stored does not
depend on it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raypipe.errors import UsageError
from raypipe.storage.hashing import content_digest
from raypipe.storage.models import Model
from raypipe.storage.store import Store

# A run key is unique within a workspace, but a tracking server holds runs of many workspaces.
_TAG = "raypipe.run"
_EXPERIMENT = "raypipe"
# MLflow's default retries take minutes for each request, and the whole job would wait for them.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
# Characters that occur in names of figures and that MLflow does not accept.
_IN_WORDS = str.maketrans({"@": "_at_", "–": "-", ">": "over", ",": ""})


class Tracking:
    """Where runs and models are reported.

    `mode` is "auto" or "off"; when it is "off", nothing is imported or opened. `tell` is called with a line of text
    when a report did not arrive.
    """

    def __init__(self, store: Store, mode: str, tell: Callable[[str], None]) -> None:
        self.store = store
        self.tell = tell
        self.uri = tracking_uri(store) if mode == "auto" else None

    def log_run(
        self,
        job: str,
        run_key: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, str] | None = None,
        **tags: str,
    ) -> None:
        """Report a finished run, with `files` (name → text) as its artifacts.

        The same run key reopens the same MLflow run.
        """
        if self.uri is None:
            return
        with self._told(f"the run {run_key[:12]} of {job}"):
            client = self._client()
            experiment = client.get_experiment_by_name(_EXPERIMENT)
            if experiment is not None:
                experiment_id = experiment.experiment_id
            else:
                location = f"{self.store.local_path('mlartifacts').as_uri()}" if self.store.is_local else None
                experiment_id = client.create_experiment(_EXPERIMENT, artifact_location=location)
            mark = content_digest(self.store.uri, run_key)
            found = client.search_runs([experiment_id], f"tags.`{_TAG}` = '{mark}'", max_results=1)
            run_id = (
                found[0].info.run_id
                if found
                else client.create_run(experiment_id, run_name=f"{job}-{run_key[:8]}").info.run_id
            )
            for key, value in {_TAG: mark, "raypipe.run_key": run_key, "raypipe.job": job, **tags}.items():
                client.set_tag(run_id, key, value)
            if not found:
                for key, value in params.items():
                    client.log_param(run_id, key, str(value)[:500])
            for name, figure in metrics.items():
                client.log_metric(run_id, name.translate(_IN_WORDS), float(figure))
            for name, text in (files or {}).items():
                client.log_text(run_id, text, name)
            client.set_terminated(run_id)

    def register(self, model: Model) -> None:
        """Register a stored model in MLflow's registry. The same content is registered once."""
        if self.uri is None:
            return
        with self._told(f"the model {model.name}/{model.hash[:12]}"):
            client = self._client()
            name = f"{_EXPERIMENT}-{model.name}"
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            source = self.store.object_uri(model.folder)
            if not any(version.source == source for version in client.search_model_versions(f"name = '{name}'")):
                client.create_model_version(name, source, tags={"recipe": model.recipe})

    def unregister(self, model: Model) -> None:
        """Delete the registry's entries of a stored model that will be removed."""
        if self.uri is None:
            return
        with self._told(f"the end of the model {model.name}/{model.hash[:12]}"):
            client = self._client()
            name = f"{_EXPERIMENT}-{model.name}"
            for version in client.search_model_versions(f"name = '{name}'"):
                if version.source == self.store.object_uri(model.folder):
                    client.delete_model_version(name, version.version)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            self.tell(f"MLflow was not told of {what}, and all else is done: {reason}")

    def _client(self) -> Any:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        # After the import, because the import sets levels of its own.
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        return MlflowClient(self.uri, registry_uri=self.uri)


def tracking_uri(store: Store) -> str:
    """`MLFLOW_TRACKING_URI`, or the SQLite database of a local workspace. Raises UsageError if neither is possible."""
    if from_environment := os.environ.get("MLFLOW_TRACKING_URI"):
        return from_environment
    if not store.is_local:
        raise UsageError(
            f"The workspace {store.uri} is on an object store, and no MLflow server is named.",
            "Set MLFLOW_TRACKING_URI to your tracking server, or run with `--tracking off`.",
        )
    return f"sqlite:///{store.local_path('mlflow.db')}"
