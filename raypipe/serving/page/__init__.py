"""The playground: a web page for people. It holds no data, and calls the routes under /v1 with the token typed in."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; \
frame-ancestors 'none'; form-action 'none'"
)


def add_page(app: FastAPI) -> None:
    """Add a route for each file of the page. These routes are not part of the API's description."""
    for path, (name, kind) in FILES.items():
        send_file(app, path, files(__package__).joinpath(name).read_bytes(), kind, _POLICY)


def send_file(app: FastAPI, path: str, content: bytes, kind: str, policy: str) -> None:
    """Add a route that sends `content`. `policy` is its Content-Security-Policy: what a browser may load for it."""
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}

    async def send() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)

    app.add_api_route(path, send, include_in_schema=False)
