"""Titles read from states over HTTP: those that batch names, and held to the catalogue by the service's own switch."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raypipe.engines.engine import EngineConfig
from raypipe.metrics.recovery import titles_in
from raypipe.pipeline.sampling_seeds import user_seeds
from raypipe.recommenders.windows import Histories
from raypipe.storage.models import Models, find_model
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from raypipe.systems.interpreter_figures import SEPARATOR
from raypipe.systems.interpreter_prompts import InterpreterPrompts
from raypipe.systems.recinterpreter import InterpreterConfig, RecInterpreter
from tests.pipeline.small_logs import newest
from tests.serving.lm_release import INTERPRETER, SHORT, TOKENS
from tests.serving.local_service import LocalService

TITLES = 4
HISTORIES = [[3, 4, 5, 6], [9, 2, 7, 11, 5], [8, 1, 12], [10, 4, 6, 2, 3, 1]]


def first_test_templates() -> InterpreterPrompts:
    """Those that the service asks with: batch would ask with the others in turn."""
    prompts = INTERPRETER.prompts
    first = {
        name: {"training": getattr(prompts, name).training, "test": getattr(prompts, name).test[:1]}
        for name in ("recovery", "recovery_of_one", "residual")
    }
    return InterpreterPrompts.model_validate(first)


def service_of(uri: str, options: InterpreterConfig, *, held: bool | None = None) -> LocalService:
    """One whose adapter that reads states says of itself that it was trained and measured with these options; `held` as the
    service is set, None for its default."""
    store = Store(uri)
    model = Models(store).newest("recinterpreter")
    assert model is not None
    card = store.local_path(f"{model.folder}/model.json")
    told = json.loads(card.read_text())
    told["lineage"]["options"] = options.model_dump(mode="json")
    card.write_text(json.dumps(told))
    reading: dict[str, Any] = {"max_new_tokens": TOKENS} | ({} if held is None else {"constrained": held})
    return LocalService(uri, f"held-{held}", language={**SHORT, "reading": reading})


def batch_answers(uri: str, service: LocalService, options: InterpreterConfig) -> dict[tuple[str, ...], list[str]]:
    """What `align` reads of HISTORIES, by their titles: of recovery, of residual and of the oracle."""
    found: dict[tuple[str, ...], list[str]] = {}

    class Recorded(RecInterpreter):
        def figures(self, answers, readings, oracles, known):
            for at, reading in enumerate(readings):
                found.setdefault(tuple(reading.history), list(answers[at :: len(readings)]))
            return super().figures(answers, readings, oracles, known)

    store = Store(uri)
    champion = Releases(store).named("champion")
    assert champion is not None
    adapter = store.local_path(f"models/recinterpreter/{champion.adapters['recinterpreter']}/checkpoint")
    lm = store.local_path(f"{find_model(Models(store), f'lm/{champion.lm}').folder}/checkpoint")
    engine = EngineConfig(lm=str(lm), adapter=str(adapter), device="cpu").build()
    ends = np.cumsum([len(history) for history in HISTORIES])
    histories = Histories(np.concatenate(HISTORIES).astype(np.int32), ends)
    source = replace(service.backend.watcher.served.source, histories=histories, held_out=np.ones(len(HISTORIES), bool))
    Recorded(options).measured(source, engine, len(HISTORIES), TOKENS)
    return found


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("constrained", [True, False])
def test_batch_and_online_read_the_same_titles(ready_lm: str, listed: bool, constrained: bool) -> None:
    """G7, in float32: of a list as of titles that are answers of their own, held to the catalogue or not."""
    options = InterpreterConfig(
        after="item", titles=TITLES, listed=listed, constrained=constrained, prompts=first_test_templates()
    )
    service = service_of(ready_lm, options, held=constrained)
    known = service.backend.watcher.served.source.known
    expected = batch_answers(ready_lm, service, options)
    assert len(expected) == len(HISTORIES)
    asks = [{"history": [f"i{item}" for item in history]} for history in HISTORIES]
    answers = {
        route: service.post(f"{route}/batch", {"queries": asks}).json()["answers"]
        for route in ("interpret", "residual", "oracle")
    }
    for at, history in enumerate(HISTORIES):
        texts = expected[tuple(f"Title {item}" for item in history[-TITLES:])]
        assert [answers[route][at]["text"] for route in answers] == [text.strip() for text in texts]
        titles = answers["interpret"][at]["titles"]
        assert titles == titles_in(texts[0], known, SEPARATOR)
        if constrained:
            assert set(titles) <= known
            assert answers["residual"][at]["title"] in known
        if not listed:
            assert len(set(titles)) == len(titles) == TITLES
    assert service.post("interpret", asks[0]).json() == answers["interpret"][0]


@pytest.mark.parametrize("measured", [True, False])
def test_the_service_says_whether_titles_are_held_to_the_catalogue_and_not_the_adapter(
    ready_lm: str, measured: bool
) -> None:
    """They are unless it is told otherwise; explanations are free either way."""
    options = InterpreterConfig(after="item", titles=TITLES, constrained=measured)
    asks = {"history": ["i3", "i4", "i5"]}
    held, free = service_of(ready_lm, options), service_of(ready_lm, options, held=False)
    known = held.backend.watcher.served.source.known
    read = held.post("interpret", asks).json()
    assert read["text"] == SEPARATOR.join(read["titles"])
    assert read["titles"]
    assert set(read["titles"]) <= known
    assert not set(free.post("interpret", asks).json()["titles"]) & known
    for route in ("residual", "oracle"):
        assert held.post(route, asks).json()["title"] in known
        assert free.post(route, asks).json()["title"] is None
    explained = held.post("explain", asks).json()
    assert explained == free.post("explain", asks).json()
    assert explained["text"] not in known


def test_an_oracle_is_sampled_by_the_seeds_of_the_list(ready_lm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's by those of the published list, a history's by its own: whatever the recommender makes of them."""
    service = service_of(ready_lm, InterpreterConfig(after="item", titles=TITLES))
    recommender = service.backend.watcher.served.recommender
    drawn: list[list[int] | None] = []

    def queries(states, seeds=None):
        drawn.append(None if seeds is None else seeds.tolist())
        return states

    monkeypatch.setattr(recommender, "queries", queries)
    users = newest(ready_lm, "histories").sort_by("user_id")
    expected = user_seeds(users["user_id"].combine_chunks(), users["history_key"].combine_chunks()).tolist()
    for user, seed in list(zip(users["user_id"].to_pylist(), expected, strict=True))[:3]:
        assert service.post("oracle", {"user_id": user}).status_code == 200
        assert service.post("recommend", {"user_id": user}).status_code == 200
        assert drawn == [[seed], [seed]]
        drawn.clear()
    for route in ("oracle", "recommend"):
        assert service.post(route, {"history": ["i3", "i4", "i5"]}).status_code == 200
    assert drawn[0] == drawn[1]
    assert drawn[0] is not None
