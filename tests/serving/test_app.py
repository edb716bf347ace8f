"""The application as Ray Serve's own configuration files describe it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built
from ray.serve.schema import ServeDeploySchema

from raypipe.serving.app import build
from raypipe.serving.config import ServiceConfig

FILE = Path(__file__).parents[2] / "cluster/serve.yaml"


def test_the_clusters_file_deploys_this_application() -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))
    (application,) = schema.applications
    assert application.import_path == "raypipe.serving.app:build"
    deployment = application_of(application.args)
    autoscaling = deployment._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == (2, 8)
    assert deployment.max_queued_requests == ServiceConfig().replicas.queued
    language = application_of(application.args).init_args[1]._bound_deployment
    assert (language.name, language.num_replicas, language.ray_actor_options["num_cpus"]) == ("language", 1, 2)


def application_of(arguments: dict[str, Any]) -> Any:
    """The ingress."""
    return built(build, arguments)._bound_deployment


def test_without_a_language_model_there_is_one_deployment() -> None:
    assert application_of({"language": {"replicas": 0}}).init_args[1] is None
    with pytest.raises(ValidationError, match="less than two batches of 32"):
        ServiceConfig.model_validate({"language": {"ongoing": 40}})


def test_a_replica_can_have_two_batches_at_a_time() -> None:
    deployment = build(ServiceConfig())._bound_deployment
    assert deployment.max_ongoing_requests >= 2 * ServiceConfig().batching.size
    with pytest.raises(ValidationError, match="less than two batches of 64"):
        ServiceConfig.model_validate({"replicas": {"ongoing": 100}})


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(ValidationError, match="worksapce"):
        built(build, {"worksapce": "s3://bucket/ws"})
