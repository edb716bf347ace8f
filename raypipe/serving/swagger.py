"""The API's description as a page: Swagger UI, from files of this machine, since a cluster may reach no other.

Like the page at `/` it holds no data, and calls the routes with the token the user types in.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html

from raypipe.serving.page import send_file

DOCS_PATH, OPENAPI_PATH = "/docs", "/openapi.json"
FILES = {
    "/docs/swagger-ui-bundle.js": ("swagger-ui-bundle.js", "text/javascript"),
    "/docs/swagger-ui.css": ("swagger-ui.css", "text/css"),
}
_SCHEME = "token"
# Swagger UI writes styles into elements (`unsafe-inline`), and takes its icons from the style sheet (`data:`).
_POLICY = (
    "default-src 'none'; script-src 'self' {script}; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)


def add_swagger(app: FastAPI, without_token: str) -> None:
    """Add the page and its files, and note in the schema that every route except `without_token` needs a token."""
    page = get_swagger_ui_html(
        # Relative, since a proxy may serve the page below a path of its own.
        openapi_url=OPENAPI_PATH.removeprefix("/"),
        title=app.title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    ).body
    (script,) = re.findall(rb"<script>(.*?)</script>", bytes(page), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    send_file(app, DOCS_PATH, bytes(page), "text/html", _POLICY.format(script=f"'sha256-{digest}'"))
    for path, (name, kind) in FILES.items():
        send_file(
            app, path, files("fastapi_offline").joinpath("static", name).read_bytes(), kind, _POLICY.format(script="")
        )
    described = app.openapi

    def with_tokens() -> dict[str, Any]:
        schema = described()
        schema["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{_SCHEME: []}]
        schema["paths"][without_token]["get"]["security"] = []
        return schema

    app.openapi = with_tokens  # type: ignore[method-assign]
