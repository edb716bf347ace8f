"""Keeps closed the gRPC port that Ray Serve opens in every replica."""

from __future__ import annotations

from typing import Any


def disable_grpc_port() -> None:
    """Open no gRPC port for calls between deployments. Call it in a replica before its first request.

    Ray Serve opens the port on every address, and unpickles what arrives without asking who sent it: whoever reaches
    the port can run code. Calls use it only with RAY_SERVE_USE_GRPC_BY_DEFAULT, and then it stays open; otherwise calls
    go through Ray, which asks for a token.
    """
    from ray.serve._private import constants, replica

    def open_none(server: Any, address: str) -> int:
        return 0

    if not constants.RAY_SERVE_USE_GRPC_BY_DEFAULT:
        assert hasattr(replica, "add_port_to_grpc_server"), "Ray opens it by another name, and it would stay open"
        replica.add_port_to_grpc_server = open_none
