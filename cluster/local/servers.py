"""The servers beside the nodes, on the bridge's own address: Redis, an S3 server, MLflow on PostgreSQL, Prometheus."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from options import Options
from processes import ROOT, answers, listens, run

BIN = Path(sys.executable).parent
METRICS_PORT = 8080


class Servers:
    """The commands of the servers. Their data and settings are in the cluster's folder."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder

    def commands(self) -> Iterator[tuple[str, list[str], Callable[[], bool]]]:
        """Yield (name, command, whether it is up), in the order in which the servers need each other.

        Each server is prepared before it is yielded.
        """
        for name in ("redis", "prometheus", "mlflow"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        options, host = self.options, self.options.host
        yield "redis", self._redis(), partial(listens, host, options.redis_port)
        s3 = [str(BIN / "python"), "-m", "moto.server", "-H", host, "-p", str(options.s3_port)]
        yield "s3", s3, partial(answers, f"http://{host}:{options.s3_port}/moto-api/data.json")
        yield "postgres", self._postgres(), partial(listens, host, options.postgres_port)
        yield "mlflow", self._mlflow(), partial(answers, f"http://{host}:{options.mlflow_port}/health")
        yield "prometheus", self._prometheus(), partial(answers, f"http://{host}:{options.prometheus_port}/-/ready")

    def _redis(self) -> list[str]:
        password = (self.folder / "redis-password").read_text()
        words = ["redis-server", "--bind", self.options.host, "--port", str(self.options.redis_port)]
        return [*words, "--requirepass", password, "--dir", str(self.folder / "redis"), "--appendonly", "yes"]

    def _postgres(self) -> list[str]:
        """The command of PostgreSQL, as the user postgres, because PostgreSQL refuses to run as root."""
        options, data = self.options, self.folder / "postgres"
        programs = postgres_bin()
        assert programs is not None
        owner = pwd.getpwnam("postgres")
        as_owner = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        if not data.exists():
            data.mkdir(mode=0o700)
            os.chown(data, owner.pw_uid, owner.pw_gid)
            password = data.parent / "postgres-password"
            os.chown(password, owner.pw_uid, owner.pw_gid)
            words = [str(programs / "initdb"), "-D", str(data), "-U", "mlflow", "--auth", "scram-sha-256", "--no-sync"]
            run(*as_owner, *words, "--pwfile", str(password))
            with (data / "pg_hba.conf").open("a") as access:
                access.write(f"host all mlflow {options.network}.0/24 scram-sha-256\n")
        words = [str(programs / "postgres"), "-D", str(data), "-h", options.host, "-p", str(options.postgres_port)]
        return [*as_owner, *words, "-k", ""]

    def _mlflow(self) -> list[str]:
        options = self.options
        password = (self.folder / "postgres-password").read_text()
        database = f"postgresql+psycopg2://mlflow:{password}@{options.host}:{options.postgres_port}/postgres"
        # MLflow's job runner would be seven more processes that nobody here needs.
        words = ["env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", str(BIN / "mlflow"), "server", "--workers", "1"]
        words += ["--backend-store-uri", database]
        words += ["--host", options.host, "--port", str(options.mlflow_port), "--allowed-hosts", "*"]
        return [*words, "--artifacts-destination", str(self.folder / "mlflow")]

    def _prometheus(self) -> list[str]:
        options = self.options
        import yaml

        config = yaml.safe_load((ROOT / "cluster/prometheus/prometheus.yaml").read_text())
        config["rule_files"] = [str(ROOT / "cluster/prometheus/alerts.yaml")]
        targets = [f"{options.address(node)}:{METRICS_PORT}" for node in options.nodes]
        config["scrape_configs"] = [{"job_name": "ray", "static_configs": [{"targets": targets}]}]
        path = self.folder / "prometheus/prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        words = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={self.folder / 'prometheus/data'}"]
        return [*words, f"--web.listen-address={options.host}:{options.prometheus_port}"]

    def make_bucket(self, settings: Mapping[str, str]) -> None:
        import boto3

        boto3.client(
            "s3",
            endpoint_url=settings["AWS_ENDPOINT_URL"],
            aws_access_key_id="local",
            aws_secret_access_key="local",
            region_name="us-east-1",
        ).create_bucket(Bucket=self.options.bucket)


def postgres_bin() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return found[-1] if found else None
