"""What a release's language model writes as chosen next: the lists of batch, for whoever asks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from raypipe.engines.engine import Engine, Outcome, OutcomeError
from raypipe.language.prompt import Prompt
from raypipe.systems.lancer import Lancer
from tests.conftest import Run
from tests.made import add_item, publish
from tests.pipeline.small_logs import newest
from tests.serving.lm_release import LINE, SHORT, WRITER
from tests.serving.local_service import LocalService
from tests.serving.test_lm_routes import history_of


@pytest.fixture(scope="module")
def service(shared_lm: str) -> LocalService:
    return LocalService(shared_lm, language=SHORT)


def listed(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


@pytest.mark.usefixtures("ray_cluster")
def test_batch_and_online_write_the_same_lists(raypipe: Run, service: LocalService) -> None:
    """G7, in float32: of everybody, by user and by history, alone and together."""
    uri = service.config.workspace
    words = ("--model", "lancer", "--length", WRITER.beams, "--answer_tokens", LINE)
    ended = raypipe("recommend", "--workspace", uri, *words)
    assert ended.code == 0, ended.stderr
    rows = [row for row in newest(uri, "recommendations").to_pylist() if row["variant"] == "recommend-lancer"]
    assert len(rows) > 30
    asks = [{"user_id": row["user_id"], "count": WRITER.beams} for row in rows]
    together = service.post("next/batch", {"queries": asks}).json()["answers"]
    for answer, row in zip(together, rows, strict=True):
        assert listed(answer) == [f"i{item}" for item in row["items"] if item]
        scores = [score for score in row["scores"] if np.isfinite(score)]
        assert [item["score"] for item in answer["items"]] == pytest.approx(scores, rel=1e-5)
    best = {round(answer["items"][0]["score"], 3) for answer in together}
    assert len(best) > 10, "how likely a line is hangs on who is asked about"
    for row, whole in list(zip(rows, together, strict=True))[:5]:
        for who in ({"user_id": row["user_id"]}, {"history": history_of(uri, row["user_id"])}):
            alone = service.post("next", {**who, "count": WRITER.beams}).json()
            assert listed(alone) == listed(whole)
            assert (alone["adapter"], alone["known"]) == ("lancer", "user_id" in who)
            assert re.fullmatch(r"Title \d+", alone["items"][0]["title"])


def test_what_may_not_be_in_a_list_is_not(service: LocalService) -> None:
    history = ["i3", "i9", "gone"]
    plain = service.post("next", {"history": history, "filter_seen": False}).json()
    assert (plain["unknown_items"], len(listed(plain)) > 1) == (1, True)
    assert (
        listed(service.post("next", {"history": history, "count": 1, "filter_seen": False}).json()) == listed(plain)[:1]
    )
    unseen = service.post("next", {"history": history}).json()
    assert listed(unseen) == [item for item in listed(plain) if item not in history]
    denied = service.post("next", {"history": history, "deny": listed(unseen)[:1]}).json()
    assert listed(denied) == listed(unseen)[1:]
    catalogue = newest(service.config.workspace, "items").to_pylist()
    (name, (value, *_)) = dict(catalogue[0]["attributes"]).popitem()
    of_value = {row["item_id"] for row in catalogue if value in dict(row["attributes"]).get(name, ())}
    only = service.post("next", {"history": history, "only": {name: value}}).json()
    assert listed(only) == [item for item in listed(unseen) if item in of_value]


def test_what_cannot_be_continued_is_told(service: LocalService, ready: str) -> None:
    cases = [
        ({"user_id": "stranger"}, 404, "no_such_user"),
        ({"history": []}, 422, "nothing_known"),
        ({"history": ["unheard of"]}, 422, "nothing_known"),
        ({"history": ["i1"], "only": {"genre": "Unheard of"}}, 422, "no_such_value"),
        ({"history": ["i1"], "count": 0}, 422, "invalid"),
        ({"history": ["i1"], "count": 501}, 413, "too_much"),
        ({"history": ["i1"], "adapter": "trsr"}, 409, "no_adapter"),
    ]
    for body, status, code in cases:
        answer = service.post("next", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), body
    crowded = LocalService(service.config.workspace, "crowded", language={**SHORT, "answer_tokens": 500})
    refused = crowded.post("next", {"history": ["i1", "i2"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_much")
    assert LocalService(ready).post("next", {"history": ["i1"]}).json()["error"]["code"] == "no_adapter"


def test_weights_without_numbers_are_not_told_as_a_history_that_is_too_long(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(lancer: Lancer, engine: Engine, prompts: Sequence[Prompt], most_tokens: int) -> list[Outcome]:
        error = OutcomeError("not_finite", "no number")
        return [Outcome(number, error=error) for number in range(len(prompts))]

    monkeypatch.setattr(Lancer, "answers", damaged)
    refused = service.post("next", {"history": ["i1", "i2"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_answer")
    assert "found no number" in refused.json()["error"]["message"]


def test_a_night_with_a_title_that_cannot_be_written_is_refused_and_the_night_before_answers(
    raypipe: Run, ready_lm: str
) -> None:
    service = LocalService(ready_lm, language=SHORT)

    def night(date: str, title: str) -> Any:
        add_item(ready_lm, title)
        publish(ready_lm, date)
        assert raypipe("online", "--workspace", ready_lm).code == 0
        service.backend.watcher.poll()
        return service.get("release").json()

    told = night("2026-01-06", "Title 99")
    assert (told["night"], told["refused"]) == ("2026-01-06", {})
    question = {"history": ["i3", "i9"], "count": WRITER.beams}
    before = service.post("next", question).json()
    assert len(listed(before)) > 1

    told = night("2026-01-07", " ".join(["Endless"] * 100))
    assert (told["night"], told["night_in_force"]) == ("2026-01-06", "2026-01-07")
    assert list(told["refused"]) == ["night 2026-01-07"]
    assert "The longest text takes" in told["refused"]["night 2026-01-07"]
    assert service.post("next", question).json() == before

    assert raypipe("night", "--workspace", ready_lm, "--restore", "2026-01-06").code == 0
    service.backend.watcher.poll()
    assert service.get("release").json()["refused"] == {}


def test_the_language_model_beside_it_keeps_its_words(service: LocalService, shared_lm: str) -> None:
    """A LANCER changes all weights of its copy, and of nobody else's."""
    question = {"history": ["i3", "i9", "i4", "i5", "i6", "i7"]}
    before = LocalService(shared_lm, "fresh", language=SHORT).post("summary", question).json()["summaries"]
    service.post("next", question)
    assert service.post("summary", question).json()["summaries"] == before
