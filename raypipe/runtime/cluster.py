"""The connection to Ray: the cluster that a job was submitted to, or a private one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading

from raypipe.config import Config, free
from raypipe.errors import UnavailableError, UsageError

# Ray reads this when it is first imported. With 0 Ray uses 127.0.0.1 for this machine; otherwise its processes would
# listen on every address. With 0 they can be reached from this machine only.
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Ray Train starts one process per training that looks for nodes that will be preempted. A cluster of one machine has no
# other node, so it needs none.
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# Part of Ray's message when it could not start in time.
_LATE = "timed out during startup"
# A private cluster claims at least this many CPUs, so that training with two workers never waits for a second core.
_MIN_CPUS = 2


class ClusterConfig(Config):
    """Where the units run. No field shapes an output."""

    address: str | None = free(None, "Ray address; unset: the cluster of `ray job submit`, else a private one here")
    workers: int | None = free(
        None,
        "parallel workers; those that do not fit yet are waited for, or an autoscaler starts nodes; unset: one per CPU that is there",
        ge=1,
    )
    cpus_per_worker: float = free(1.0, "CPUs reserved for each worker", gt=0)
    gpus_per_worker: float = free(0.0, "GPUs reserved for each worker, fractions allowed", ge=0)
    driver_cpus: float = free(
        0.0, "CPUs of the cluster that the driver itself takes, as `raypipe submit` asks for", ge=0
    )
    stall_s: float = free(3600.0, "seconds a worker may take for a micro-batch before it counts as hung", gt=0)

    @property
    def is_private(self) -> bool:
        """Whether Ray is started on this machine for this process only."""
        return not (self.address or os.environ.get("RAY_ADDRESS"))

    def connect(self, metrics_port: int | None = None) -> None:
        """Connect to Ray, once per process.

        A Ray that is started here exports its metrics on 127.0.0.1:`metrics_port`; if that is None, on any port. Raises
        UnavailableError if nothing answers, and UsageError if the cluster refuses the connection.
        """
        if self.is_private:
            os.environ.setdefault(_LOOPBACK, "0")
            os.environ.setdefault(_WATCHER, "0")
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        import ray

        if ray.is_initialized():
            return
        address = self.address or os.environ.get("RAY_ADDRESS")
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            if address:
                ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
            else:
                # Without an address Ray would join what `ray start` last started here, dead or alive.
                ray.init(
                    address="local",
                    include_dashboard=False,
                    _metrics_export_port=metrics_port,
                    num_cpus=max(self.workers or 0, os.cpu_count() or 1, _MIN_CPUS),
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                    object_store_memory=200 * 2**20,
                )
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            passing = isinstance(error, ConnectionError | TimeoutError)
            raise (UnavailableError if passing else UsageError)(
                f"Ray could not be reached at {address or 'this machine'}: {str(error).splitlines()[0]}",
                "Check `ray status`, RAY_ADDRESS and RAY_AUTH_TOKEN, or leave --cluster.address out to run on this machine.",
            ) from error
        except Exception as error:
            # Ray has no exception type for this.
            if _LATE not in str(error):
                raise
            raise UnavailableError(
                "Ray did not start on this machine in the time that it gives itself: too much else runs here.",
                "Submit the same command again when less does.",
            ) from error
        if callable(on_term) and threading.current_thread() is threading.main_thread():
            # Ray's core installs a crash handler for SIGTERM, but a job should stop cleanly.
            signal.signal(signal.SIGTERM, on_term)

    def size(self) -> int:
        """The number of workers to start: `workers`, or as many as fit on the CPUs (or GPUs) that the cluster has now.

        Work begins as soon as the first worker runs. Workers that do not fit are requested from the autoscaler, if
        there is one.
        """
        if self.workers is not None:
            return self.workers
        import ray

        resources = ray.cluster_resources()
        fits = int((resources.get("CPU", 1) - self.driver_cpus) / self.cpus_per_worker)
        if self.gpus_per_worker:
            fits = min(fits, int(resources.get("GPU", 0) / self.gpus_per_worker))
        return max(1, fits)
