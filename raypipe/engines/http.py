"""Prompts over HTTP to any endpoint with the chat completions API of OpenAI: vLLM, llama.cpp, a gateway, a provider.

Many requests are in flight at once. What may pass (429, 5xx, a timeout, a broken connection, an answer that is none) is
tried again after a growing, jittered pause, or the one the server asks for. What will not pass concerns one prompt (any
other 4xx: an error in its place) or all of them (a wrong key, a wrong address: `EngineDownError`). A prompt whose attempts
are used up is blamed only if the endpoint still answers a word of our own; where it does not, it is down, and
`EngineDownError` ends the work: an outage rejects nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import aiohttp

from raypipe.engines.engine import (
    Capabilities,
    Choices,
    Decoding,
    EngineDownError,
    ErrorKind,
    HttpConfig,
    Outcome,
    OutcomeError,
    Piece,
    Scores,
    lacking,
    prompt_seed,
)
from raypipe.language.prompt import Prompt

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_MOST_BYTES = 4 * 2**20
_QUOTED = 300
_PROBE = "Answer with one word: yes."


class _PassingError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, kind: ErrorKind, message: str, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.pause_s = kind, message, pause_s


class HttpEngine:
    """Answers prompts over HTTP; implements `Engine`."""

    capabilities = Capabilities()

    def __init__(self, config: HttpConfig, context: int, count: Callable[[Sequence[str]], list[int]]) -> None:
        self.config, self.context = config, context
        self.count_tokens = count

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
    ) -> Iterator[Outcome]:
        self.capabilities.require(decoding, choices)
        if not prompts:
            return
        found: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
        with _Background(self._all(prompts, decoding, found.put), found.put):
            while (outcome := found.get()) is not None:
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome

    def stream(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Piece | Outcome]:
        raise lacking("answers piece by piece")

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Iterator[Scores]:
        raise lacking("log-probabilities")

    async def _all(self, prompts: Sequence[Prompt], decoding: Decoding, found: Callable[[Outcome], None]) -> None:
        key = os.environ.get(self.config.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=self.config.timeout_s)
        connector = aiohttp.TCPConnector(limit=self.config.concurrency)
        todo = iter(enumerate(prompts))

        async def work(session: aiohttp.ClientSession) -> None:
            for index, prompt in todo:
                found(await self._answer(session, index, prompt, decoding))

        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(self.config.concurrency, len(prompts))):
                group.create_task(work(session))

    async def _answer(self, session: aiohttp.ClientSession, index: int, prompt: Prompt, decoding: Decoding) -> Outcome:
        if prompt.has_vectors:
            return Outcome(index, error=OutcomeError("unsupported_prompt", "An HTTP endpoint reads text only."))
        tokens = self.count_tokens([prompt.text])[0]
        if tokens + decoding.max_new_tokens > self.context:
            message = f"{tokens} tokens and {decoding.max_new_tokens} of answer exceed the context of {self.context}."
            return Outcome(index, tokens_in=tokens, error=OutcomeError("prompt_too_long", message))
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt.text}],
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "seed": prompt_seed(decoding.seed, prompt.text) >> 32,  # 31 bits: what every server takes
        }
        try:
            return await self._attempts(session, index, body)
        except _PassingError as problem:
            try:
                await self._attempts(session, index, {**body, "messages": [{"role": "user", "content": _PROBE}]})
            except _PassingError as outage:
                raise EngineDownError(
                    f"{self.config.url} answers nothing: {outage.message}",
                    "Check the endpoint and submit the job again; it goes on where it stopped.",
                ) from None
            return Outcome(index, error=OutcomeError(problem.kind, problem.message))

    async def _attempts(self, session: aiohttp.ClientSession, index: int, body: dict[str, Any]) -> Outcome:
        """Raises the problem of the last attempt."""
        # Jitter that the prompt decides, so that reruns pause alike.
        jitter = random.Random(body["seed"])
        pause = _FIRST_PAUSE_S
        for attempt in range(1, self.config.attempts + 1):
            try:
                return await self._attempt(session, index, body)
            except _PassingError as problem:
                if attempt == self.config.attempts:
                    raise
                asked = problem.pause_s if problem.pause_s is not None else pause * (0.5 + jitter.random())
                await asyncio.sleep(min(asked, _LONGEST_PAUSE_S))
                pause *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, session: aiohttp.ClientSession, index: int, body: dict[str, Any]) -> Outcome:
        try:
            async with session.post(f"{self.config.url.rstrip('/')}/chat/completions", json=body) as response:
                status, pause = response.status, _pause(response.headers.get("Retry-After"))
                raw = b""
                async for chunk in response.content.iter_any():
                    raw += chunk
                    if len(raw) > _MOST_BYTES:
                        raise _PassingError("bad_response", f"The answer has more than {_MOST_BYTES} bytes.")
        except TimeoutError:
            raise _PassingError("timeout", f"No answer within {self.config.timeout_s:.0f} s.") from None
        except aiohttp.ClientError as error:
            raise _PassingError("server_error", f"The connection failed: {error!r}.") from None
        text = raw.decode("utf-8", "replace")
        if status == 200:
            return _outcome(index, text)
        said = f"HTTP {status}: {' '.join(text.split())[:_QUOTED]}"
        if status in {401, 403, 404}:
            remedy = f"Check http.url, http.model and the key in {self.config.key_variable}."
            raise EngineDownError(f"{self.config.url} refuses every request: {said}", remedy)
        if status in {408, 409, 425, 429} or status >= 500:
            raise _PassingError("server_error", said, pause)
        return Outcome(index, error=OutcomeError("refused", said))


def _outcome(index: int, text: str) -> Outcome:
    """What a 200 holds; what is no chat completion may be one the next time."""
    try:
        told = json.loads(text)
        choice = told["choices"][0]
        written, reason = choice["message"]["content"], choice.get("finish_reason")
        usage = told.get("usage") or {}
        tokens_in, tokens_out = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _PassingError("bad_response", f"The answer is no chat completion ({error!r}): {text[:_QUOTED]}") from None
    if not isinstance(written, str | None) or min(tokens_in, tokens_out) < 0:
        raise _PassingError("bad_response", f"The answer is no chat completion: {text[:_QUOTED]}")
    if reason == "content_filter":
        return Outcome(index, error=OutcomeError("refused", "The endpoint's content filter stopped the answer."))
    return Outcome(index, written or "", tokens_in, tokens_out, "length" if reason == "length" else "stop")


def _pause(header: str | None) -> float | None:
    """Seconds that a server asks to wait; a date, or nonsense, is no answer."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None


class _Background:
    """A coroutine in a loop and a thread of its own, cancelled when nobody waits any more.

    The last thing `found` is given is None, or what ended the coroutine.
    """

    def __init__(self, work: Coroutine[Any, Any, None], found: Callable[[Any], None]) -> None:
        self._work, self._found = work, found
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        self._started.wait()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed already
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._registered())
        except BaseExceptionGroup as group:
            self._found(group.exceptions[0])
        except (Exception, asyncio.CancelledError) as error:
            self._found(error)
        else:
            self._found(None)

    async def _registered(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.ensure_future(self._work)
        self._started.set()
        await self._task
