"""A proxy before a job server whose connections that follow a job's logs go silent and stay open, as those to a lost node do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_FOLLOWS = b"/logs/tail"


@contextmanager
def silent_proxy(host: str, port: int) -> Iterator[tuple[int, list[int]]]:
    """The proxy's port, and how many bytes each connection that followed a job's logs got before it fell silent."""
    silenced: list[int] = []
    opened: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, port))
            opened.extend([client, server])
            threading.Thread(target=talk, args=(client, server), daemon=True).start()

    def talk(client: socket.socket, server: socket.socket) -> None:
        asked = client.recv(1 << 16)
        server.sendall(asked)
        if _FOLLOWS in asked.split(b"\r\n", 1)[0]:
            answer = server.recv(1 << 16)
            client.sendall(answer)
            silenced.append(len(answer))
            return
        threading.Thread(target=pass_on, args=(client, server), daemon=True).start()
        pass_on(server, client)

    def pass_on(source: socket.socket, to: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)
        except OSError:
            return

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], silenced
    finally:
        for one in [listener, *opened]:
            one.close()
