"""The gRPC port that Ray Serve opens in every replica, and how it is kept closed."""

from __future__ import annotations

from typing import Any


def disable_grpc_port() -> None:
    """In a replica, before it gets its first request: no gRPC port for calls between deployments.

    Ray Serve opens one on every address, and unpickles what arrives there without asking who sent it: whoever reaches it has
    code run. Calls go through it only with RAY_SERVE_USE_GRPC_BY_DEFAULT; else they go through Ray, which asks for a token.
    """
    from ray.serve._private import constants, replica

    def open_none(server: Any, address: str) -> int:
        return 0

    if not constants.RAY_SERVE_USE_GRPC_BY_DEFAULT:
        assert hasattr(replica, "add_port_to_grpc_server"), "Ray opens it by another name, and it would stay open"
        replica.add_port_to_grpc_server = open_none
