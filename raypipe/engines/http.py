"""Prompts over HTTP to any endpoint with the chat completions API of OpenAI: vLLM, llama.cpp, a gateway, a provider.

Many requests are in flight at once. A failure that may pass (429, 5xx, a timeout, a broken connection, an answer that
is none) is tried again after a growing, jittered pause, or the pause that the server asks for. A failure that will not
pass and concerns all prompts (a wrong key or address, an empty account, a redirection, which is never followed) is an
`EngineDownError`. If a prompt is refused by any other 4xx, or its attempts are used up, the endpoint is asked a short
question of our own. If it answers that, the prompt is to blame and gets the error. If not, `EngineDownError` ends the
work, so that an outage, or an option that the model does not take, rejects no prompt.
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
from dataclasses import dataclass, field, replace
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


class _FailedError(Exception):
    """An attempt failed. The failure may pass unless its kind is `refused`."""

    def __init__(self, kind: ErrorKind, message: str, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.pause_s = kind, message, pause_s
        self.calls = 1


@dataclass
class _Asking:
    """The state of one call of `generate`. `answers_us` is true once the endpoint has answered our own question."""

    session: aiohttp.ClientSession
    decoding: Decoding
    answers_us: bool = False
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)


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
        key = os.environ.get(self.config.key_variable, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=self.config.timeout_s)
        connector = aiohttp.TCPConnector(limit=self.config.concurrency)
        todo = iter(enumerate(prompts))

        async def work(asking: _Asking) -> None:
            for index, prompt in todo:
                found(await self._answer(asking, index, prompt))

        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            asking = _Asking(session, decoding)
            for _ in range(min(self.config.concurrency, len(prompts))):
                group.create_task(work(asking))

    async def _answer(self, asking: _Asking, index: int, prompt: Prompt) -> Outcome:
        if prompt.has_vectors:
            return Outcome(index, error=OutcomeError("unsupported_prompt", "An HTTP endpoint reads text only."))
        decoding = asking.decoding
        tokens = self.count_tokens([prompt.text])[0]
        if tokens + decoding.max_new_tokens > self.context:
            message = f"{tokens} tokens and {decoding.max_new_tokens} of answer exceed the context of {self.context}."
            return Outcome(index, tokens_in=tokens, error=OutcomeError("prompt_too_long", message))
        seed = prompt_seed(decoding.seed, prompt.text) >> 32  # 31 bits, which every server takes
        try:
            return await self._attempts(asking, index, prompt.text, seed)
        except _FailedError as problem:
            spent = await self._probe(asking, problem.kind == "refused", seed)
            error = OutcomeError(problem.kind, problem.message)
            return replace(spent, index=index, text="", error=error, calls=problem.calls + spent.calls)

    async def _probe(self, asking: _Asking, refused: bool, seed: int) -> Outcome:
        """Ask the endpoint a question of our own; returns what that cost. Raises EngineDownError if it does not answer.

        After a refusal it is asked once only, as an endpoint that refuses everything does not change. An outage may
        begin at any time, so after other failures it is asked each time.
        """
        async with asking.probing if refused else contextlib.nullcontext():
            if refused and asking.answers_us:
                return Outcome(0, calls=0)
            try:
                outcome = await self._attempts(asking, 0, _PROBE, seed)
            except _FailedError as problem:
                if problem.kind == "refused":
                    raise self._down(problem.message) from None
                raise EngineDownError(
                    f"{self.config.url} answers nothing: {problem.message}",
                    "Check the endpoint and submit the job again; it goes on where it stopped.",
                ) from None
            asking.answers_us = True
            return outcome

    def _down(self, said: str) -> EngineDownError:
        return EngineDownError(
            f"{self.config.url} refuses every request: {said}",
            f"Check http.url, http.model, the key in {self.config.key_variable} and its account, and that the model takes "
            "max_tokens, temperature and seed.",
        )

    async def _attempts(self, asking: _Asking, index: int, text: str, seed: int) -> Outcome:
        """Attempt a prompt until it is answered. Raises _FailedError of the last attempt if none succeeds.

        The outcome and the error hold the number of attempts in `calls`.
        """
        # The prompt decides the jitter, so that reruns pause alike.
        jitter = random.Random(seed)
        pause = _FIRST_PAUSE_S
        for attempt in range(1, self.config.attempts + 1):
            try:
                return replace(await self._attempt(asking, index, text, seed), calls=attempt)
            except _FailedError as problem:
                problem.calls = attempt
                if attempt == self.config.attempts or problem.kind == "refused":
                    raise
                asked = problem.pause_s if problem.pause_s is not None else pause * (0.5 + jitter.random())
                await asyncio.sleep(min(asked, _LONGEST_PAUSE_S))
                pause *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, asking: _Asking, index: int, text: str, seed: int) -> Outcome:
        address, raw = f"{self.config.url.rstrip('/')}/chat/completions", b""
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": asking.decoding.max_new_tokens,
            "temperature": asking.decoding.temperature,
            "seed": seed,
        }
        try:
            # A redirection would send the prompt to a host for which `consent` was never given.
            async with asking.session.post(address, json=body, allow_redirects=False) as response:
                status, headers = response.status, response.headers
                async for chunk in response.content.iter_any():
                    raw += chunk
                    if len(raw) > _MOST_BYTES:
                        raise _FailedError("bad_response", f"The answer has more than {_MOST_BYTES} bytes.")
        except TimeoutError:
            raise _FailedError("timeout", f"No answer within {self.config.timeout_s:.0f} s.") from None
        except aiohttp.ClientError as error:
            raise _FailedError("server_error", f"The connection failed: {error!r}.") from None
        answer = raw.decode("utf-8", "replace")
        if status == 200:
            return self._counted(_outcome(index, answer), text)
        said = f"HTTP {status}: {' '.join(answer.split())[:_QUOTED]}"
        if 300 <= status < 400:
            place = headers.get("Location", "nowhere")
            remedy = "If that is the endpoint, set http.url to it, up to /v1, and http.consent if prompts may go there."
            raise EngineDownError(f"{self.config.url} redirects every request to {place} (HTTP {status}).", remedy)
        if status in {401, 402, 403, 404, 405}:
            raise self._down(said)
        if status in {408, 409, 425, 429} or status >= 500:
            raise _FailedError("server_error", said, _pause(headers.get("Retry-After")))
        raise _FailedError("refused", said)

    def _counted(self, outcome: Outcome, text: str) -> Outcome:
        """The outcome with our own count of tokens if the endpoint reports none: caps have to hold in any case."""
        tokens_in = outcome.tokens_in or self.count_tokens([text])[0]
        tokens_out = outcome.tokens_out or (self.count_tokens([outcome.text])[0] if outcome.text else 0)
        return replace(outcome, tokens_in=tokens_in, tokens_out=tokens_out)


def _outcome(index: int, text: str) -> Outcome:
    """The outcome in the body of a 200. Raises _FailedError if it is no chat completion; it may be one next time."""
    try:
        told = json.loads(text)
        choice = told["choices"][0]
        written, reason = choice["message"]["content"], choice.get("finish_reason")
        usage = told.get("usage") or {}
        tokens_in, tokens_out = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _FailedError("bad_response", f"The answer is no chat completion ({error!r}): {text[:_QUOTED]}") from None
    if not isinstance(written, str | None) or min(tokens_in, tokens_out) < 0:
        raise _FailedError("bad_response", f"The answer is no chat completion: {text[:_QUOTED]}")
    if reason == "content_filter":
        stopped = OutcomeError("refused", "The endpoint's content filter stopped the answer.")
        return Outcome(index, "", tokens_in, tokens_out, error=stopped)
    # If the limit cut an emoji, JSON may hold half of a surrogate pair, which UTF-8 cannot encode.
    written = (written or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Outcome(index, written, tokens_in, tokens_out, "length" if reason == "length" else "stop")


def _pause(header: str | None) -> float | None:
    """Seconds to wait that a Retry-After header asks for; None if it holds a date or nonsense."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None


class _Background:
    """Runs a coroutine in an event loop and a thread of its own, and cancels it when the context is left.

    The last call of `found` is with None, or with the error that ended the coroutine.
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
