"""Write the manifests of this folder with a team's values filled in.

    python cluster/kuberay/render.py --config my-values.yaml --folder build/kuberay

`apply.yaml` is for `kubectl apply`: accounts, configuration, network policies, the standing cluster and the nightly
schedule. `jobs/JOB.yaml` is one RayJob for every job, for `kubectl create`; each runs on a cluster of its own that ends
with the job. `serve.yaml` is the online service. `monitoring.yaml` is for clusters with the Prometheus operator. A
manifest is YAML in which `${name}` stands for a value: alone it keeps the value's type, and within text it becomes
text.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from raypipe.cli.main import JOBS, config_type
from raypipe.cli.options import parse_config, validated
from raypipe.config import Config, free
from raypipe.errors import RaypipeError, UsageError
from raypipe.runtime.cluster import ClusterConfig

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "jobs"
_NAME = re.compile(r"\$\{([a-z_.]+)\}")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://(?:[^/@]*@)?[^/:@]+(?::(\d+))?(?:/|$)")
_BYTES = r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$"
_UNITS = {"": 1} | {
    f"{letter}{i}": base**power for base, i in ((1000, ""), (1024, "i")) for power, letter in enumerate("KMGT", 1)
}
_STORE_SHARE = 0.9  # of the shared memory; the rest is for other users of it, such as NCCL
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "redis": 6379, "rediss": 6379}


class Head(Config):
    """The head. It runs none of our work: its `num-cpus` is 0."""

    cpu: str = free("4", "CPUs of the head")
    memory: str = free("16Gi", "memory of the head")
    shared_memory: str = free("2Gi", "of its memory, Ray's object store", pattern=_BYTES)


class Workers(Config):
    """One group of workers that the autoscaler starts and stops."""

    min: int = free(0, "workers that are always there", ge=0)
    max: int = free(8, "workers at most", ge=0)
    cpu: str = free("8", "CPUs of each")
    memory: str = free("32Gi", "memory of each")
    shared_memory: str = free("8Gi", "of its memory, Ray's object store", pattern=_BYTES)
    node_selector: dict[str, str] = free(dict, "labels of the nodes they may run on")


class GpuWorkers(Workers):
    """Workers with GPUs."""

    gpus: str = free("1", "GPUs of each")


class Secrets(Config):
    """Names of Secrets. Render creates none of them."""

    ray_token: str = free("raypipe-ray-token", "key auth_token: what clients of Ray have to know")
    redis: str = free("raypipe-redis", "key password")
    environment: str = free(
        "raypipe-secrets",
        "what pods get as variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, OPENAI_API_KEY, HF_TOKEN",
    )


class Shared(Config):
    """A volume that all pods mount. Trainings on several nodes, or on GPUs, need it."""

    claim: str = free("", "a PersistentVolumeClaim, ReadWriteMany; unset: trainings stay on the driver's node")
    path: str = free("/shared", "where it is mounted", pattern="^/.")


class Namespaces(Config):
    """The namespaces of other services that may reach the cluster."""

    operator: str = free("kuberay-operator", "where KubeRay's operator runs")
    monitoring: str = free("monitoring", "where Prometheus runs")
    ingress: str = free("ingress", "from where requests reach the online service")


class Values(Config):
    """The values that a team may change. The README's table lists those that it must change."""

    folder: str = free("build/kuberay", "where the manifests are written")
    namespace: str = free("raypipe", "namespace of everything here; it has to exist")
    image: str = free(..., "image built from cluster/Dockerfile")
    gpu_image: str = free(..., "image built from cluster/Dockerfile with EXTRAS=gpu,redis")
    workspace: str = free(..., "s3:// URI of the workspace", pattern="^s3://")
    mlflow_uri: str = free(..., "MLflow's tracking server")
    redis_address: str = free(..., "redis://HOST:PORT for the standing cluster's fault tolerance")
    environment: dict[str, str] = free(dict, "variables of every pod, for example AWS_REGION")
    schedule: str = free("30 1 * * *", "when the night starts, as cron writes it")
    time_zone: str = free("Etc/UTC", "of the schedule and of the night's date")
    attempts: int = free(3, "of a night that fails; one that a gate refused is not tried again", ge=1)
    deadline_s: int = free(36_000, "seconds after which a job is given up", ge=60)
    keep_s: int = free(86_400, "seconds for which a finished job's record is kept", ge=0)
    head: Head = free(Head, "the head")
    cpu_workers: Workers = free(Workers, "workers for everything that needs no GPU")
    gpu_workers: GpuWorkers = free(GpuWorkers, "workers for models")
    secrets: Secrets = free(Secrets, "names of Secrets")
    namespaces: Namespaces = free(Namespaces, "namespaces of others")
    shared: Shared = free(Shared, "a volume of all pods")
    jobs: dict[str, dict[str, Any]] = free(dict, "configuration of each job, the same keys as of `raypipe JOB`")


def main(argv: list[str]) -> int:
    """Write every manifest below `folder`, and return the exit code."""
    try:
        values = parse_config("render", Values, argv)
        check_jobs(values)
    except RaypipeError as error:
        print(f"render: {error}", file=sys.stderr)
        return error.exit_code
    folder = Path(values.folder)
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    (folder / "apply.yaml").write_text(yaml.safe_dump_all(standing(values), sort_keys=False))
    (folder / "serve.yaml").write_text(yaml.safe_dump_all(service(values), sort_keys=False))
    (folder / "monitoring.yaml").write_text(yaml.safe_dump_all(monitoring(values), sort_keys=False))
    for job in job_names():
        (folder / "jobs" / f"{job}.yaml").write_text(yaml.safe_dump(ray_job(values, job), sort_keys=False))
    print(f"Written: apply.yaml, serve.yaml, monitoring.yaml and {len(job_names())} files in jobs/ below {folder}")
    return 0


def job_names() -> list[str]:
    """The jobs that have a script in `jobs/`."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem in JOBS)


def check_jobs(values: Values) -> None:
    """Raise UsageError if the configuration of a job is one that the job would refuse."""
    for job, config in values.jobs.items():
        if job not in job_names():
            raise UsageError(f"jobs.{job} is no job.", f"There are {', '.join(job_names())}.")
        validated(config_type(job), config)


def standing(values: Values) -> list[dict[str, Any]]:
    """The manifests for `kubectl apply`."""
    known = _known(values)
    jobs = {f"{job}.yaml": yaml.safe_dump(job_config(values, job), sort_keys=False) for job in job_names()}
    known |= {
        "job_configs": jobs,
        "nightly_manifest": json.dumps(ray_job(values, "nightly")),
    }
    names = ("accounts.yaml", "configuration.yaml", "network-policies.yaml", "raycluster.yaml", "nightly.yaml")
    return [manifest for name in names for manifest in _load(name, known)]


def job_config(values: Values, job: str) -> dict[str, Any]:
    """A job's configuration.

    With a shared volume it gets the folders that workers of all nodes must see on that volume.
    """
    config = values.jobs.get(job, {})
    return _on_volume(config_type(job), config, values.shared.path) if values.shared.claim else config


def _on_volume(kind: type[Config], given: dict[str, Any], path: str) -> dict[str, Any]:
    folders = {"work_folder": f"{path}/work", "model_cache": f"{path}/models"}
    found = dict(given)
    for name, field in kind.model_fields.items():
        part = field.annotation
        if name in folders:
            found.setdefault(name, folders[name])
        # A step that is left out unless it is named gets no values.
        elif (
            isinstance(part, type)
            and issubclass(part, Config)
            and field.default_factory is not None
            and (inner := _on_volume(part, given.get(name, {}), path))
        ):
            found[name] = inner
    return found


def service(values: Values) -> list[dict[str, Any]]:
    """The manifests of the online service.

    The address of its store may hold a password, so it comes from RAYPIPE_ONLINE_STORE in the Secret.
    """
    config = yaml.safe_load((HERE.parent / "serve.yaml").read_text(encoding="utf-8"))
    for application in config["applications"]:
        application["args"]["workspace"] = values.workspace
        application["args"].pop("store", None)
    known = _known(values)
    cluster = _load("raycluster.yaml", known)[0]["spec"]
    # Without it KubeRay uses the cluster's UID. During an upgrade there are two clusters, and they must not share their
    # state.
    del cluster["gcsFaultToleranceOptions"]["externalStorageNamespace"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        # Read when Ray starts, by every process of Serve.
        container["env"] = [
            {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"},
            {"name": "RAY_SERVE_HAPROXY_RETRY_ON", "value": "conn-failure empty-response"},
            # The default is an hour, and a client that sends nothing occupies one of the limited connections.
            {"name": "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S", "value": "120"},
        ]
        container["ports"].append({"containerPort": 8000, "name": "serve"})
        group["template"]["metadata"]["labels"]["raypipe/serves"] = "true"
    return _load(
        "rayservice.yaml", known | {"serve_config": yaml.safe_dump(config, sort_keys=False), "cluster": cluster}
    )


def monitoring(values: Values) -> list[dict[str, Any]]:
    """The manifests for Prometheus: where it finds the pods, and the alert rules."""
    alerts = yaml.safe_load((HERE.parent / "prometheus/alerts.yaml").read_text(encoding="utf-8"))
    return _load("monitoring.yaml", _known(values) | {"alerts": alerts["groups"]})


def ray_job(values: Values, job: str) -> dict[str, Any]:
    """The RayJob of one job on a cluster of its own.

    If the head is lost, the job ends. If it is submitted again, it continues where it stopped.
    """
    known = _known(values)
    cluster = _load("raycluster.yaml", known)[0]["spec"]
    del cluster["gcsFaultToleranceOptions"]
    (manifest,) = _load("rayjob.yaml", known | {"job": job, "cluster": cluster, "workers": workers(values, job)})
    return manifest


def workers(values: Values, job: str) -> int:
    """The number of workers that a job asks for: as configured, else as many as the largest cluster holds beside the
    driver.

    Left to itself, a job counts the CPUs only once, before the autoscaler has started more than the driver's pod.
    """
    asked = ClusterConfig.model_validate(values.jobs.get(job, {}).get("cluster", {}))
    if asked.workers is not None:
        return asked.workers
    if asked.gpus_per_worker or not values.cpu_workers.max:
        group, gpus = values.gpu_workers, _whole(values.gpu_workers.gpus)
    else:
        group, gpus = values.cpu_workers, 0
    cpus = _whole(group.cpu)

    def fit(free_cpus: int) -> int:
        fits = int(free_cpus / asked.cpus_per_worker)
        return min(fits, int(gpus / asked.gpus_per_worker)) if asked.gpus_per_worker else fits

    with_driver = 0 if asked.gpus_per_worker and values.cpu_workers.max else min(1, group.max)
    return max(1, fit(cpus) * (group.max - with_driver) + fit(cpus - 1) * with_driver)


def _whole(quantity: str) -> int:
    """A Kubernetes quantity as a whole number, as KubeRay passes it to Ray: 7500m CPUs are 8."""
    return math.ceil(int(quantity.removesuffix("m")) / 1000) if quantity.endswith("m") else math.ceil(float(quantity))


def _bytes(quantity: str) -> float:
    number = quantity.rstrip("kKMGTi")
    return float(number) * _UNITS[quantity.removeprefix(number).upper().replace("I", "i")]


def _ports_named(values: Values) -> Iterator[int]:
    """The port of every URL among the values."""
    for text in (values.mlflow_uri, values.redis_address, *values.environment.values()):
        if (found := _URL.match(text)) and (port := int(found[1] or _PORTS.get(text.split(":")[0], 0))):
            yield port


def _known(values: Values) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def add(prefix: str, config: Config) -> None:
        for name in type(config).model_fields:
            value = getattr(config, name)
            if isinstance(value, Config):
                add(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    add("", values)
    import ray

    for group in ("head", "cpu_workers", "gpu_workers"):
        flat[f"{group}.object_store"] = str(int(_STORE_SHARE * _bytes(flat[f"{group}.shared_memory"])))
    flat["environment"] = {"MLFLOW_TRACKING_URI": values.mlflow_uri, **values.environment}
    flat["egress"] = [{"protocol": "TCP", "port": port} for port in sorted({443, 6443, *_ports_named(values)})]
    return flat | {"ray_version": ray.__version__, "retries": values.attempts - 1}


def _load(name: str, known: dict[str, Any]) -> list[dict[str, Any]]:
    filled = [_fill(node, known) for node in yaml.safe_load_all((HERE / name).read_text(encoding="utf-8"))]
    if name == "raycluster.yaml" and known["shared.claim"]:
        _mount(filled[0]["spec"], known["shared.claim"], known["shared.path"])
    return filled


def _mount(cluster: dict[str, Any], claim: str, path: str) -> None:
    """Mount the shared volume in all pods of a cluster."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        pod["volumes"].append({"name": "shared", "persistentVolumeClaim": {"claimName": claim}})
        (container,) = pod["containers"]
        container["volumeMounts"].append({"name": "shared", "mountPath": path})


def _fill(node: Any, known: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return {key: _fill(value, known) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, known) for value in node]
    if not isinstance(node, str):
        return node
    if alone := _NAME.fullmatch(node):
        return known[alone[1]]
    return _NAME.sub(lambda found: str(known[found[1]]), node)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
