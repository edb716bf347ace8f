"""A real HTTP server with the chat completions API that answers by the echo engine, and misbehaves where a prompt says so.

A prompt holds `[words]` for what happens to it, `[500 2]` for the first two requests of it only:

    500, 429, 400, …      that status; 429 asks for a pause of 0.2 s, 307 for the address `elsewhere`
    stall                 no answer for a minute
    cut                   the connection is closed in the middle of the answer
    html, empty, negative, endless    a 200 that is no completion
    surrogate             a completion that ends in the middle of an emoji
    silent, filter        a completion without a word; one that the content filter stopped
"""

from __future__ import annotations

import asyncio
import collections
import re
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

from raypipe.engines.echo import EchoEngine
from raypipe.engines.engine import Decoding
from raypipe.language.prompt import Prompt

_ORDER = re.compile(r"\[([a-z0-9]+)(?: (\d+))?\]")


class ChatServer:
    """Serves in a thread. `requests` are the bodies in order, `most` how many were in flight at once; after `down_after`
    requests it answers none. `answer`, where given, writes the answers instead of the echo; `to_all` is what happens to
    every prompt. Without `usage` it tells no tokens."""

    def __init__(self, key: str = "", answer: Callable[[str], str] | None = None) -> None:
        self.key = key
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.most = self._now = 0
        self.down_after: int | None = None  # requests
        self.to_all = self.elsewhere = ""
        self.usage = True
        self._seen: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> ChatServer:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.requests]

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            down = self.down_after is not None and len(self.requests) > self.down_after
            if down or (self.key and request.headers.get("Authorization") != f"Bearer {self.key}"):
                return web.Response(status=503 if down else 401, text="go away")
            return await self._obey(request, body)
        finally:
            self._now -= 1

    async def _obey(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        prompt = body["messages"][0]["content"]
        self._seen[prompt] += 1
        order = _ORDER.search(self.to_all or prompt)
        word = order[1] if order and self._seen[prompt] <= int(order[2] or 10**9) else ""
        if word.isdigit():
            headers = {"429": {"Retry-After": "0.2"}, "307": {"Location": self.elsewhere}}.get(word, {})
            return web.Response(status=int(word), text=f"told to answer {word}", headers=headers)
        if word == "stall":
            await asyncio.sleep(60)
        if word == "endless":
            return web.Response(body=b"[" * (5 * 2**20))
        if word == "cut":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"choices"')
            assert request.transport is not None
            request.transport.close()
            return response
        if word == "html":
            return web.Response(text="<html>It works!</html>", content_type="text/html")
        if word == "empty":
            return web.json_response({"choices": []})
        await asyncio.sleep(0.005)
        (outcome,) = EchoEngine().generate([Prompt.of(prompt)], Decoding(max_new_tokens=body["max_tokens"]))
        text = None if word == "silent" else self.answer(prompt) if self.answer else outcome.text
        if word == "surrogate":
            text = f"{text} \ud83d"
        reason = "content_filter" if word == "filter" else outcome.finish_reason
        tokens = -5 if word == "negative" else outcome.tokens_in
        usage = {"prompt_tokens": tokens, "completion_tokens": outcome.tokens_out}
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
        return web.json_response({"choices": [choice], **({"usage": usage} if self.usage else {})})
