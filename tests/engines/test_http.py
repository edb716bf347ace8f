"""The HTTP engine against a real server that also fails, stalls, limits the rate and lies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from raypipe.engines.checks import AnswerChecks
from raypipe.engines.engine import Decoding, EngineConfig, EngineDownError, Outcome
from raypipe.language.prompt import Prompt
from tests.engines.chat_server import ChatServer


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raypipe.engines.http._FIRST_PAUSE_S", 0.01)


def answers(server: ChatServer, prompts: list[str], **options: object) -> list[Outcome]:
    http = {"url": server.url, "model": "echo", "timeout_s": 1.0, "attempts": 3, **options}
    engine = EngineConfig.model_validate({"engine": "openai", "http": http}).build()
    return sorted(engine.generate([Prompt.of(p) for p in prompts], Decoding()), key=lambda outcome: outcome.index)


def error_of(outcome: Outcome) -> tuple[str, str]:
    assert outcome.error is not None, outcome
    return outcome.error.kind, outcome.error.message


def test_requests_are_in_flight_together_and_never_more_than_allowed(server: ChatServer) -> None:
    found = answers(server, [f"prompt {n}" for n in range(60)], concurrency=7)
    assert [outcome.index for outcome in found] == list(range(60))
    assert all(outcome.text.startswith(f"prompt {n} #") for n, outcome in enumerate(found))
    assert server.most == 7
    assert len(server.requests) == 60


@pytest.mark.parametrize(
    "trouble", ["500 2", "429 2", "stall 1", "cut 2", "html 2", "empty 2", "negative 1", "endless 1"]
)
def test_what_may_pass_is_tried_again(server: ChatServer, trouble: str) -> None:
    (outcome,) = answers(server, [f"a [{trouble}]"])
    assert outcome.error is None
    assert outcome.finish_reason == "stop"
    assert outcome.calls == len(server.requests) == int(trouble.split()[1]) + 1


def test_a_server_that_asks_for_a_pause_gets_it(server: ChatServer) -> None:
    started = time.monotonic()
    answers(server, ["a [429 2]"])
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize(
    ("trouble", "kind", "told"),
    [
        ("500", "server_error", "HTTP 500: told to answer 500"),
        ("stall", "timeout", "No answer within"),
        ("cut", "server_error", "The connection failed"),
        ("html", "bad_response", "no chat completion"),
        ("empty", "bad_response", "no chat completion"),
        ("negative", "bad_response", "no chat completion"),
        ("endless", "bad_response", "more than"),
        ("400", "refused", "HTTP 400: told to answer 400"),
        ("filter", "refused", "content filter"),
    ],
)
def test_one_bad_prompt_is_an_error_in_its_row_only(server: ChatServer, trouble: str, kind: str, told: str) -> None:
    # What does not time out by itself must not do so on a machine that is busy.
    timeout = 0.4 if trouble == "stall" else 10.0
    before, bad, after = answers(server, ["before", f"bad [{trouble}]", "after"], timeout_s=timeout)
    assert (before.error, after.error) == (None, None)
    found = error_of(bad)
    assert found[0] == kind
    assert told in found[1]
    tries = 1 if kind == "refused" else 3
    assert server.prompts.count(f"bad [{trouble}]") == tries
    assert (before.calls, bad.calls, after.calls) == (1, len(server.requests) - 2, 1)


def test_a_bad_prompt_alone_is_still_to_blame(server: ChatServer) -> None:
    (bad,) = answers(server, ["bad [500]"])
    assert error_of(bad)[0] == "server_error"


@pytest.mark.parametrize("status", ["400", "402", "405", "422"])
def test_an_endpoint_that_refuses_everybody_blames_no_prompt(server: ChatServer, status: str) -> None:
    server.to_all = f"[{status}]"
    with pytest.raises(EngineDownError, match=f"refuses every request: HTTP {status}"):
        answers(server, [f"prompt {n}" for n in range(20)], concurrency=3)
    assert len(server.requests) <= 6


def test_whether_everybody_is_refused_is_asked_once(server: ChatServer) -> None:
    found = answers(server, [f"bad [400] {n}" for n in range(20)])
    assert {error_of(outcome)[0] for outcome in found} == {"refused"}
    assert sum(outcome.calls for outcome in found) == len(server.requests) == 21


def test_a_redirection_is_not_followed(server: ChatServer) -> None:
    with ChatServer() as other:
        server.to_all, server.elsewhere = "[307]", f"{other.url}/chat/completions"
        with pytest.raises(EngineDownError, match="redirects every request to http") as caught:
            answers(server, ["what a user did"])
        assert other.url in str(caught.value)
        assert "set http.url" in caught.value.remedy
        assert other.requests == []


def test_half_an_emoji_is_a_sign_that_is_no_text(server: ChatServer) -> None:
    (outcome,) = answers(server, ["a [surrogate]"])
    assert outcome.text.endswith(" \ufffd")
    assert outcome.text.encode()
    problem = AnswerChecks().problem(outcome, Prompt.of("a"))
    assert problem is not None
    assert problem.kind == "malformed"


def test_tokens_are_counted_where_the_endpoint_tells_none(server: ChatServer) -> None:
    server.usage = False
    (outcome,) = answers(server, ["four words of prompt"])
    assert outcome.tokens_in == -(-len("four words of prompt") // 2)
    assert outcome.tokens_out == -(-len(outcome.text.encode()) // 2) > 0


def test_silence_is_an_answer_without_text(server: ChatServer) -> None:
    (outcome,) = answers(server, ["a [silent]"])
    assert (outcome.text, outcome.error) == ("", None)


def test_an_outage_blames_no_prompt(server: ChatServer) -> None:
    server.down_after = 0
    with pytest.raises(EngineDownError, match="answers nothing: HTTP 503"):
        answers(server, [f"prompt {n}" for n in range(20)], concurrency=3)
    gone = ChatServer()
    gone.url = "http://127.0.0.1:9/v1"
    with pytest.raises(EngineDownError, match="answers nothing: The connection failed"):
        answers(gone, ["a"])


def test_a_wrong_key_ends_the_work_and_a_right_one_is_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer(key="s3cret") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        with pytest.raises(EngineDownError, match="refuses every request: HTTP 401") as caught:
            answers(server, ["a", "b"])
        assert "OPENAI_API_KEY" in caught.value.remedy
        assert "wrong" not in str(caught.value)
        monkeypatch.setenv("OPENAI_API_KEY", "s3cret\n")
        assert answers(server, ["a"])[0].error is None


def test_who_stops_reading_stops_the_requests(server: ChatServer) -> None:
    http = {"url": server.url, "model": "echo", "concurrency": 2, "timeout_s": 50.0}
    engine = EngineConfig.model_validate({"engine": "openai", "http": http}).build()
    outcomes = engine.generate([Prompt.of("a"), *(Prompt.of(f"[stall] {n}") for n in range(50))], Decoding())
    assert next(outcomes).index == 0
    threads = threading.active_count()
    started = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 5
    assert threading.active_count() < threads
    assert len(server.requests) <= 4


def test_user_text_goes_to_another_host_only_with_consent() -> None:
    away = {"url": "https://api.example.com/v1", "model": "m"}
    with pytest.raises(ValidationError, match=r"would be sent to api\.example\.com"):
        EngineConfig.model_validate({"engine": "openai", "http": away})
    EngineConfig.model_validate({"engine": "openai", "http": {**away, "consent": True}})
    with pytest.raises(ValidationError, match=r"no http:// or https:// address"):
        EngineConfig.model_validate({"engine": "openai", "http": {**away, "url": "api.example.com"}})
    with pytest.raises(ValidationError, match=r"needs http\.url and http\.model"):
        EngineConfig(engine="openai")


def test_identity_is_the_models_name_and_not_the_place(server: ChatServer) -> None:
    def identity(**http: object) -> dict[str, object]:
        return EngineConfig.model_validate({"engine": "openai", "http": {"model": "m", **http}}).identity()

    here = identity(url="http://localhost:1/v1")
    assert here == identity(url="http://127.0.0.1:2/v1", concurrency=3, timeout_s=1, attempts=9)
    assert here != identity(url="http://localhost:1/v1", model="n")
