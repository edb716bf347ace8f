"""The place and the size of the local cluster."""

from __future__ import annotations

from raypipe.config import Config, free

HEAD = "head"


class Options(Config):
    """The place and the size of the cluster."""

    folder: str = free("build/local", "logs, data and the token; others may enter it, for PostgreSQL is not root")
    name: str = free("rp", "beginning of the names of namespaces and the bridge", pattern="^[a-z]{1,6}$")
    network: str = free("10.77.0", "first three numbers of the bridge's network", pattern=r"^\d+\.\d+\.\d+$")
    workers: int = free(2, "worker nodes", ge=0)
    cpus: int = free(2, "CPUs that each worker node says it has; a driver takes one", ge=1)
    head_cpus: int = free(0, "CPUs that the head says it has; with some, drivers may sit there and die with it", ge=0)
    redis_port: int = free(6379, "of Redis")
    s3_port: int = free(9000, "of the S3 server")
    postgres_port: int = free(5432, "of PostgreSQL")
    mlflow_port: int = free(5000, "of MLflow")
    prometheus_port: int = free(9090, "of Prometheus")
    bucket: str = free("raypipe", "bucket that is made")

    @property
    def host(self) -> str:
        return f"{self.network}.1"

    @property
    def nodes(self) -> list[str]:
        return [HEAD, *(f"worker{number}" for number in range(1, self.workers + 1))]

    def address(self, node: str) -> str:
        return f"{self.network}.{10 + self.nodes.index(node)}"

    def namespace(self, node: str) -> str:
        return f"{self.name}-{node}"
