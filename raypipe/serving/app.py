"""The Serve application, made by `build`: for `raypipe serve`, and for `serve deploy` by the import path of `build`."""

# Ray Serve reads the annotation of `build` to make a config of a YAML file's `args`, so it must not be a string: this
# module must not import `annotations` from `__future__`.
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from raypipe.serving.config import ServiceConfig
from raypipe.serving.lm_replica import LmReplica
from raypipe.serving.replica import Replica

NAME = "raypipe"
_RETRY_AFTER_S = 1.0


def build(config: ServiceConfig) -> Application:
    """Build the application: an ingress that recommends, and a deployment of the language model, which it asks.

    As the ingress recommends by itself, a recommendation is one hop from the proxy.
    """
    replicas = config.replicas
    autoscaling = None
    if replicas.most > replicas.least:
        autoscaling = AutoscalingConfig(
            min_replicas=replicas.least,
            max_replicas=replicas.most,
            # A replica can have more in hand than this: the rest is for load that rises while the next replica starts.
            target_ongoing_requests=max(1.0, replicas.ongoing * replicas.busy),
            upscale_delay_s=5,
            downscale_delay_s=replicas.calm_s,
            look_back_period_s=10,
            metrics_interval_s=2,
        )
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="recommender",
        num_replicas=None if autoscaling is not None else replicas.least,
        autoscaling_config=autoscaling,
        ray_actor_options={"num_cpus": replicas.cpus},
        max_ongoing_requests=replicas.ongoing,
        max_queued_requests=replicas.queued,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=_RETRY_AFTER_S),
        graceful_shutdown_timeout_s=replicas.drain_s,
        health_check_period_s=5,
        health_check_timeout_s=30,
        # The access log holds paths, and thus user ids. `RequestMiddleware` writes a line of its own instead.
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment.bind(config, _lm(config) if config.language.replicas else None)


def _lm(config: ServiceConfig) -> Application:
    options = config.language
    deployment = serve.deployment(
        LmReplica,
        name="language",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.queued,
        graceful_shutdown_timeout_s=config.replicas.drain_s,
        health_check_period_s=5,
        health_check_timeout_s=30,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment.bind(config)
