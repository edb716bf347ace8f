"""Every manifest that render writes is one that Kubernetes and KubeRay would take, and says what it has to say."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from raypipe.cli.main import config_type
from raypipe.cli.options import parse_config, validated

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster/kuberay"
SCHEMAS = ROOT.parent / "shared/schemas/kuberay"


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"raypipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where pydantic looks for the module's own names.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


KINDS = ("RayCluster", "RayJob", "RayService")
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "dataset")
RENDER = script(KUBERAY / "render.py")


def render(folder: Path, *options: str) -> int:
    return RENDER.main(["--config", str(KUBERAY / "values.yaml"), *options, "--folder", str(folder)])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kuberay")
    assert render(folder) == 0
    return folder


@pytest.fixture(scope="module")
def manifests(rendered: Path) -> list[dict[str, Any]]:
    return read(rendered)


def read(rendered: Path) -> list[dict[str, Any]]:
    jobs = [yaml.safe_load(path.read_text()) for path in sorted((rendered / "jobs").glob("*.yaml"))]
    several = [yaml.safe_load_all((rendered / name).read_text()) for name in ("apply.yaml", "serve.yaml")]
    return [*several[0], *several[1], *jobs]


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


@cache
def schema_of(kind: str) -> dict[str, Any]:
    """The resource's own schema; a field it does not name is an error, which Kubernetes would drop without a word."""
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.is_file():
        pytest.skip(f"the schemas of KubeRay are not on this machine ({path})")
    definition = yaml.load(gzip.decompress(path.read_bytes()), Loader=yaml.CSafeLoader)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def problems(value: Any, schema: dict[str, Any]) -> list[str]:
    errors = Draft202012Validator(schema).iter_errors(value)
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


def pod_specs(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pod_specs(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_specs(value)


def test_there_is_a_job_for_every_script(manifests: list[dict[str, Any]]) -> None:
    entrypoints = [job["spec"]["entrypoint"] for job in of_kind(manifests, "RayJob")]
    assert [Path(entrypoint.split()[1]).stem for entrypoint in entrypoints] == JOBS


@pytest.mark.parametrize("kind", KINDS)
def test_every_resource_of_kuberay_is_valid(manifests: list[dict[str, Any]], kind: str) -> None:
    check_valid(of_kind(manifests, kind), kind)


def check_valid(found: list[dict[str, Any]], kind: str) -> None:
    # Metadata is Kubernetes' own; the schema calls it an object and no more.
    schema = schema_of(kind) | {"additionalProperties": True}
    schema["properties"]["metadata"] = {"type": "object"}
    assert found
    for manifest in found:
        assert manifest["apiVersion"] == "ray.io/v1"
        assert problems(manifest, schema) == []


def test_a_misspelt_field_is_found(manifests: list[dict[str, Any]]) -> None:
    (cluster,) = of_kind(manifests, "RayCluster")
    broken = json.loads(json.dumps(cluster["spec"]))
    broken["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    broken["workerGroupSpecs"][0]["minReplicas"] = "none"
    told = "\n".join(problems(broken, schema_of("RayCluster")["properties"]["spec"]))
    assert "imagePullPolice" in told
    assert "minReplicas" in told


def test_the_schedules_pod_and_the_policies_rules_are_valid(manifests: list[dict[str, Any]]) -> None:
    cluster = schema_of("RayCluster")["properties"]["spec"]["properties"]
    template = cluster["headGroupSpec"]["properties"]["template"]
    template["properties"]["metadata"] = {"type": "object"}
    (schedule,) = of_kind(manifests, "CronJob")
    assert problems(schedule["spec"]["jobTemplate"]["spec"]["template"], template) == []
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]
    policies = of_kind(manifests, "NetworkPolicy")
    assert len(policies) == 4
    for policy in policies:
        spec = policy["spec"]
        assert problems(spec["ingress"], rules["ingressRules"]) == []
        assert problems(spec.get("egress", []), rules["egressRules"]) == []
        assert set(spec["policyTypes"]) == {name.capitalize() for name in ("ingress", "egress") if name in spec}


def test_no_container_is_root_and_each_says_what_it_needs(manifests: list[dict[str, Any]]) -> None:
    specs = list(pod_specs(manifests))
    assert len(specs) == 1 + 3 + 3 + 4 * len(JOBS)
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][bound])


def test_clusters_scale_authenticate_and_keep_work_off_the_head(manifests: list[dict[str, Any]]) -> None:
    (standing,) = of_kind(manifests, "RayCluster")
    jobs = of_kind(manifests, "RayJob")
    assert standing["spec"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"] == {
        "name": "raypipe-redis",
        "key": "password",
    }
    for cluster in (standing["spec"], *(job["spec"]["rayClusterSpec"] for job in jobs)):
        assert cluster["authOptions"] == {"mode": "token", "secretName": "raypipe-ray-token"}
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        assert set(groups) == {"cpu", "gpu"}
        (gpu,) = groups["gpu"]["template"]["spec"]["containers"]
        assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
        (cpu,) = groups["cpu"]["template"]["spec"]["containers"]
        assert [source.popitem()[1]["name"] for source in map(dict, cpu["envFrom"])] == [
            "raypipe-environment",
            "raypipe-secrets",
        ]
    assert all(job["spec"]["entrypointNumCpus"] == 1 for job in jobs)
    assert all("--cluster.driver_cpus 1" in job["spec"]["entrypoint"] for job in jobs)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ((), 63),  # 8 nodes of 8 CPUs, one of which is the driver's
        (("--cpu_workers.max", "3", "--cpu_workers.cpu", "3500m"), 11),
        (("--cpu_workers.max", "0"), 63),
        (("--jobs", '{"train": {"cluster": {"workers": 2}}}'), 2),
        (("--jobs", '{"train": {"cluster": {"cpus_per_worker": 3}}}'), 16),
        (("--jobs", '{"train": {"cluster": {"gpus_per_worker": 0.5}}}', "--gpu_workers.max", "5"), 10),
        (("--jobs", '{"train": {"cluster": {"gpus_per_worker": 1}}}', "--gpu_workers.gpus", "4"), 32),
        (("--cpu_workers.cpu", "1", "--cpu_workers.max", "1"), 1),
    ],
)
def test_a_job_asks_for_workers_on_all_nodes_it_may_have(tmp_path: Path, options: tuple[str, ...], asked: int) -> None:
    assert render(tmp_path, *options) == 0
    job = yaml.safe_load((tmp_path / "jobs/train.yaml").read_text())
    assert job["spec"]["entrypoint"].split()[-2:] == ["--cluster.workers", str(asked)]
    # An option of the entrypoint that the job itself would refuse is no use.
    words = job["spec"]["entrypoint"].split()[4:]
    assert parse_config("train", config_type("train"), words).cluster.workers == asked


def test_the_service_is_the_one_of_serve_yaml(manifests: list[dict[str, Any]]) -> None:
    (service,) = of_kind(manifests, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    expected = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    (application,) = expected["applications"]
    assert application["args"].pop("store").startswith("redis://")
    application["args"]["workspace"] = "s3://example-bucket/raypipe"
    assert config == expected
    cluster = service["spec"]["rayClusterConfig"]
    (standing,) = of_kind(manifests, "RayCluster")
    # An upgrade has two clusters at a time: each keeps its state in Redis under a name of its own, which KubeRay gives it.
    shared = dict(standing["spec"]["gcsFaultToleranceOptions"])
    assert shared.pop("externalStorageNamespace") == "raypipe"
    assert cluster["gcsFaultToleranceOptions"] == shared
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in container["env"]
        assert {"name": "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S", "value": "120"} in container["env"]
        assert {"containerPort": 8000, "name": "serve"} in container["ports"]
        assert group["template"]["metadata"]["labels"]["raypipe/serves"] == "true"
    # Nothing of it got into the others.
    assert "env" not in standing["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]


def groups_of(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of pods of every cluster: of each its head's, and its workers'."""
    clusters = [one["spec"] for one in of_kind(manifests, "RayCluster")]
    clusters += [one["spec"]["rayClusterSpec"] for one in of_kind(manifests, "RayJob")]
    clusters += [one["spec"]["rayClusterConfig"] for one in of_kind(manifests, "RayService")]
    assert len(clusters) == 2 + len(JOBS)
    return [group for cluster in clusters for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_rays_object_store_lies_in_shared_memory_and_not_on_disk(tmp_path: Path) -> None:
    assert render(tmp_path, "--gpu_workers.shared_memory", "500M") == 0
    shares = set()
    for group in groups_of(read(tmp_path)):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        limit = volumes["shared-memory"]["emptyDir"]["sizeLimit"]
        size = 500 * 10**6 if limit == "500M" else int(limit.removesuffix("Gi")) << 30
        shares.add(round(int(group["rayStartParams"]["object-store-memory"]) / size, 6))
    assert shares == {0.9}
    assert render(tmp_path, "--head.shared_memory", "much") == 2


def test_a_shared_volume_is_in_every_pod_and_trainings_keep_there_what_their_workers_read(tmp_path: Path) -> None:
    jobs = {"nightly": {"train": {"work_folder": "/mine"}, "summarize": {"engine": {"engine": "echo"}}}}
    assert render(tmp_path, "--shared.claim", "raypipe-work", "--jobs", json.dumps(jobs)) == 0
    found = read(tmp_path)
    for kind in KINDS:
        check_valid(of_kind(found, kind), kind)
    for group in groups_of(found):
        pod = group["template"]["spec"]
        assert {"name": "shared", "persistentVolumeClaim": {"claimName": "raypipe-work"}} in pod["volumes"]
        (container,) = pod["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
    (given,) = [one["data"] for one in of_kind(found, "ConfigMap") if "nightly.yaml" in one["data"]]
    configs = {name.removesuffix(".yaml"): yaml.safe_load(text) for name, text in given.items()}
    for job, config in configs.items():
        assert validated(config_type(job), config)
    for job in ("train", "align", "lm"):
        assert configs[job]["work_folder"] == "/shared/work"
    assert configs["align"]["model_cache"] == configs["extract"]["model_cache"] == "/shared/models"
    assert configs["nightly"]["lm"] == {"work_folder": "/shared/work"}
    assert configs["nightly"]["train"] == {"work_folder": "/mine", "model_cache": "/shared/models"}
    assert configs["nightly"]["summarize"]["engine"]["engine"] == "echo"
    assert configs["nightly"]["online"] == {"keep": 1}


def test_without_a_shared_volume_nothing_says_that_there_is_one(manifests: list[dict[str, Any]]) -> None:
    assert "work_folder" not in json.dumps(manifests)
    assert '"shared"' not in json.dumps(manifests)


def test_only_the_schedule_decides_what_is_tried_again(manifests: list[dict[str, Any]]) -> None:
    assert {job["spec"]["backoffLimit"] for job in of_kind(manifests, "RayJob")} == {0}
    (schedule,) = of_kind(manifests, "CronJob")
    job = schedule["spec"]["jobTemplate"]["spec"]
    assert job["backoffLimit"] == 2
    refused = job["podFailurePolicy"]["rules"][0]
    assert (refused["action"], refused["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    (starter,) = job["template"]["spec"]["containers"]
    assert refused["onExitCodes"]["containerName"] == starter["name"]
    assert schedule["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_night_that_is_scheduled_is_the_nightlys_rayjob(manifests: list[dict[str, Any]]) -> None:
    (scheduled,) = [one for one in of_kind(manifests, "ConfigMap") if "rayjob.json" in one["data"]]
    nightly = next(job for job in of_kind(manifests, "RayJob") if job["metadata"]["labels"]["raypipe/job"] == "nightly")
    assert json.loads(scheduled["data"]["rayjob.json"]) == nightly
    variables = next(one for one in of_kind(manifests, "ConfigMap") if "MLFLOW_TRACKING_URI" in one["data"])
    assert variables["data"] == {"MLFLOW_TRACKING_URI": "http://mlflow.mlflow.svc:5000", "AWS_REGION": "eu-west-1"}


def test_the_scheduled_night_is_loaded_for_the_service(manifests: list[dict[str, Any]]) -> None:
    (jobs,) = [one for one in of_kind(manifests, "ConfigMap") if "nightly.yaml" in one["data"]]
    nightly = validated(config_type("nightly"), yaml.safe_load(jobs["data"]["nightly.yaml"]))
    assert nightly.online.keep == 1
    # Where to is a secret of the pods, those of the night as those of the service.
    assert nightly.online.store is None


def test_values_reach_the_manifests_with_their_types(tmp_path: Path) -> None:
    options = ["--cpu_workers.max", "77", "--gpu_workers.node_selector", '{"pool": "h200"}', "--namespace", "night"]
    assert render(tmp_path, *options) == 0
    found = list(yaml.safe_load_all((tmp_path / "apply.yaml").read_text()))
    cpu, gpu = of_kind(found, "RayCluster")[0]["spec"]["workerGroupSpecs"]
    assert cpu["maxReplicas"] == 77
    assert gpu["template"]["spec"]["nodeSelector"] == {"pool": "h200"}
    assert {manifest["metadata"]["namespace"] for manifest in found} == {"night"}
    assert "${" not in (tmp_path / "apply.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--jobs", '{"nightly": {"summarise": {}}}'], "Did you mean 'summarize'?"),
        (["--jobs", '{"status": {}}'], "jobs.status is no job"),
        (["--workspace", "/tmp/here"], "Correct --workspace"),
    ],
)
def test_values_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert render(tmp_path / "out", *options) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pods_reach_the_ports_of_the_urls_that_are_given(tmp_path: Path) -> None:
    variables = {
        "AWS_ENDPOINT_URL": "http://minio.storage.svc:9000",
        "HTTPS_PROXY": "http://proxy",
        "AWS_REGION": "a:1",
    }
    given = (
        "--environment",
        json.dumps(variables),
        "--mlflow_uri",
        "http://mlflow:5001",
        "--redis_address",
        "redis://r:6380",
    )
    assert render(tmp_path / "out", *given) == 0
    policies = of_kind(list(yaml.safe_load_all((tmp_path / "out/apply.yaml").read_text())), "NetworkPolicy")
    (rules,) = [policy["spec"]["egress"] for policy in policies if "Egress" in policy["spec"]["policyTypes"]]
    anywhere = [rule for rule in rules if "to" not in rule]
    assert [[port["port"] for port in rule["ports"]] for rule in anywhere] == [[80, 443, 5001, 6380, 6443, 9000]]


def test_the_readme_names_what_a_team_has_to_change() -> None:
    table = re.findall(r"^\| `([a-z_.]+)` \|", (ROOT / "cluster/README.md").read_text(), re.MULTILINE)
    given = yaml.safe_load((KUBERAY / "values.yaml").read_text())
    required = {"image", "gpu_image", "workspace", "mlflow_uri", "redis_address", "jobs"}
    assert required <= set(table)
    assert set(given) <= {name.split(".")[0] for name in table}


def test_the_image_is_of_pinned_versions_and_no_root() -> None:
    lines = (ROOT / "cluster/Dockerfile").read_text().splitlines()
    assert any("constraints.txt" in line and line.startswith("COPY") for line in lines)
    assert any("--constraint /tmp/constraints.txt" in line for line in lines)
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    copied = {word for line in lines if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
