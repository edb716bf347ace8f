"""The cluster of machines is one that `ray up` accepts."""

from __future__ import annotations

import json
from pathlib import Path

import ray
import yaml
from jsonschema import Draft7Validator

CONFIG = Path(__file__).parents[2] / "cluster/vms/ray-up.yaml"
SCHEMA = Path(ray.__file__).parent / "autoscaler/ray-schema.json"


def test_ray_up_knows_every_field_and_the_token_goes_along() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    errors = Draft7Validator(json.loads(SCHEMA.read_text())).iter_errors(config)
    assert [f"{error.json_path}: {error.message[:200]}" for error in errors] == []
    assert "~/.ray/auth_token" in config["file_mounts"]
    started = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in started)
    assert "--num-cpus=0" in config["head_start_ray_commands"][1]
