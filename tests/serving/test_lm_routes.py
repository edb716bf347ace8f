"""The language model over HTTP: the same as in batch, told while it grows, and clear where it has no words."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from raypipe.engines.echo import EchoEngine
from raypipe.engines.engine import Choices, Decoding, EngineConfig, Outcome
from raypipe.errors import UsageError
from raypipe.language.prompt import Vectors
from raypipe.language.trie import AnswerTrie
from raypipe.metrics.recovery import titles_in
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.sequences import Sequences
from raypipe.serving.config import ServiceConfig
from raypipe.serving.lm_engines import Failed, LmEngines, LoadedEngine, ModelKey, PendingTask, Summarize
from raypipe.serving.queries import InterpretQuery
from raypipe.storage.models import Models
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from raypipe.systems.recinterpreter import Reading, recovery_prompt
from raypipe.systems.summaries import SummariesConfig, UserSummary, blocks_of
from tests.conftest import Run
from tests.made import add_item
from tests.pipeline.small_logs import CHAIN_ITEMS, newest
from tests.serving.lm_release import FREE, SHORT, TOKENS
from tests.serving.local_service import LocalService

SLOW_S = 1.0
CHECKS = ("--checks.retries", "0", "--checks.most_characters", "100000")


@pytest.fixture(scope="module")
def service(shared_lm: str) -> LocalService:
    return LocalService(shared_lm, language=SHORT)


def history_of(uri: str, user: str) -> list[str]:
    (row,) = [row for row in newest(uri, "histories").to_pylist() if row["user_id"] == user]
    return [f"i{item}" for item in row["items"]]


def events(answer: Any) -> list[tuple[str, dict[str, Any]]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in answer.text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_batch_and_online_explain_with_the_same_words(raypipe: Run, service: LocalService) -> None:
    """G7, in float32: of everybody's top recommendation, by user and by history, alone and together."""
    listed = raypipe("recommend", "--workspace", service.config.workspace, "--model", "sasrec")
    assert listed.code == 0, listed.stderr
    words = ("explain", "--workspace", service.config.workspace, "--decoding.max_new_tokens", TOKENS, *CHECKS)
    ended = raypipe(*words, "--max_reject_rate", "1")
    assert ended.code == 0, ended.stderr
    rows = newest(service.config.workspace, "explanations").to_pylist()
    assert len(rows) == ended.metrics["computed"] > 30
    asks = [{"user_id": row["user_id"]} for row in rows]
    together = service.post("explain/batch", {"queries": asks}).json()["answers"]
    for row, answer in zip(rows, together, strict=True):
        assert (answer["item"]["item_id"], answer["decision"]) == (f"i{row['item_index']}", row["decision"])
        assert (answer["text"], answer["adapter"], answer["known"]) == (row["text"], "recexplainer-h", True)
    for row in rows[:5]:
        history = history_of(service.config.workspace, row["user_id"])
        item = f"i{row['item_index']}"
        for who in ({"user_id": row["user_id"]}, {"history": history}):
            alone = service.post("explain", {**who, "item_id": item}).json()
            assert (alone["decision"], alone["text"]) == (row["decision"], row["text"])


@pytest.mark.usefixtures("ray_cluster")
def test_batch_and_online_sum_up_with_the_same_words(raypipe: Run, service: LocalService) -> None:
    """G7, in float32."""
    decoding = (
        "--summaries.block_decoding.max_new_tokens",
        TOKENS,
        "--summaries.merge_decoding.max_new_tokens",
        TOKENS,
    )
    words = ("summarize", "--workspace", service.config.workspace, *decoding)
    ended = raypipe(*words, "--summaries.checks.retries", "0", "--max_reject_rate", "1")
    assert ended.code == 0, ended.stderr
    rows = [row for row in newest(service.config.workspace, "summaries").to_pylist() if row["calls"] > 1]
    assert len(rows) > 10
    asks = [{"history": history_of(service.config.workspace, row["user_id"])} for row in rows]
    answers = service.post("summary/batch", {"queries": asks}).json()["answers"]
    assert [answer["summaries"] for answer in answers] == [{"hierarchical": row["summary"]} for row in rows]


def test_an_explanation_that_is_told_while_it_grows_ends_as_the_whole_one(service: LocalService) -> None:
    for query in ({"user_id": "u1"}, {"history": ["i3", "i4"], "item_id": "i9", "focus": "genre"}):
        whole = service.post("explain", query).json()
        told = events(service.post("explain/stream", query))
        assert [name for name, _ in told[:1]] == ["decision"]
        assert {name for name, _ in told[1:-1]} == {"text"}
        assert told[0][1] == {"decision": whole["decision"]}
        assert "".join(data["text"] for _, data in told[1:-1]).strip() == whole["text"]
        assert len(told) > TOKENS / 2
        assert not any("again" in event for event in told)
        assert told[-1] == ("done", whole)


def test_what_the_checks_refuse_is_begun_anew_and_at_last_an_error(ready_lm: str) -> None:
    service = LocalService(ready_lm, language={**SHORT, "checks": {"retries": 1, "most_characters": 3}})
    told = events(service.post("explain/stream", {"user_id": "u1"}))
    assert [name for name, _ in told].count("again") == 1
    assert told[-1][0] == "error"
    assert told[-1][1]["code"] == "no_answer"
    refused = service.post("explain", {"user_id": "u1"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_answer")
    assert "too_long" in refused.json()["error"]["message"]


def test_adapters_are_chosen_by_name_and_answer_by_themselves(service: LocalService) -> None:
    query = {"user_id": "u2", "item_id": "i5"}
    texts = {
        name: service.post("explain", {**query, "adapter": name}).json()
        for name in ("recexplainer-h", "recexplainer-i")
    }
    assert [answer["adapter"] for answer in texts.values()] == list(texts)
    assert len({answer["text"] for answer in texts.values()}) == 2
    assert service.get("release").json()["adapters"] == {
        "recexplainer-h": "recexplainer",
        "recexplainer-i": "recexplainer",
        "recinterpreter": "recinterpreter",
        "trsr": "trsr",
        "lancer": "lancer",
    }
    for route, name in (("explain", "recinterpreter"), ("interpret", "recexplainer-h"), ("explain", "nothing")):
        refused = service.post(route, {"user_id": "u2", "adapter": name})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_adapter")
        assert "it has rec" in refused.json()["error"]["message"]


def test_states_are_read_as_the_engine_of_batch_reads_them(shared_lm: str) -> None:
    service = LocalService(shared_lm, "free", language={**SHORT, "reading": FREE})
    store = Store(shared_lm)
    champion = Releases(store).named("champion")
    assert champion is not None
    folders = {
        name: str(store.local_path(f"models/{name}/{content}/checkpoint"))
        for name, content in champion.adapters.items()
    }
    lm = str(store.local_path(f"models/lm/{champion.lm}/checkpoint"))
    engine = EngineConfig(lm=lm, adapter=folders["recinterpreter"], device="cpu").build()
    recommender, _ = load_recommender(store.local_path(f"models/{champion.recommender}/checkpoint"))
    history = [3, 4, 5, 6]
    asks = {"history": [f"i{item}" for item in history]}
    served = service.backend.watcher.served
    system = served.adapters["recinterpreter"].system
    state = recommender.encode(Sequences.of([history])).detach().numpy()
    reading = Reading(Vectors(state, "state"), Vectors(state, "state"), Vectors(state, "state"), [])
    prompt = recovery_prompt(system.recovery.test[0], reading)
    (outcome,) = engine.generate([prompt], Decoding(max_new_tokens=TOKENS))
    answer = service.post("interpret", asks).json()
    assert answer["text"] == outcome.text
    assert answer["history"] == [f"Title {item}" for item in history]
    known = {f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)}
    assert answer["titles"] == titles_in(outcome.text, known, "; ")

    residual, oracle = service.post("residual", asks).json(), service.post("oracle", asks).json()
    assert residual["expected"] == "Title 6"
    scores = recommender.score(recommender.encode(Sequences.of([history])))[0].detach()
    assert oracle["expected"] == f"Title {int(scores[1:].argmax()) + 1}"
    for found in (residual, oracle):
        assert found["title"] in {None, *known}
        assert found["text"] not in {"", answer["text"]}
    together = service.post("residual/batch", {"queries": [asks, {"user_id": "nobody"}, asks]}).json()["answers"]
    assert together[0] == together[2] == residual
    assert together[1]["code"] == "no_such_user"
    assert service.post("oracle/batch", {"queries": [asks]}).json()["answers"] == [oracle]
    assert service.post("interpret/batch", {"queries": [asks]}).json()["answers"] == [answer]


def test_what_hangs_on_the_release_alone_is_made_once(ready_lm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Item states, what answers are held to, and its tries, of a list and of one title, however often they are asked for."""
    made: Counter[str] = Counter()

    def counted(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def one(*args: Any, **kwargs: Any) -> Any:
            made[name] += 1
            return make(*args, **kwargs)

        return one

    service = LocalService(ready_lm, language=SHORT)
    recommender = service.backend.watcher.served.recommender
    monkeypatch.setattr("raypipe.engines.transformers.AnswerTrie", counted("tries", AnswerTrie))
    monkeypatch.setattr("raypipe.systems.title_search.Choices", counted("choices", Choices))
    monkeypatch.setattr(type(recommender), "item_states", counted("item states", type(recommender).item_states))
    answers = [
        [
            service.post(route, {"history": ["i3", "i4", f"i{n}"]}).json()
            for route in ("interpret", "residual", "oracle")
        ]
        for n in (5, 9, 5)
    ]
    assert answers[0] == answers[2] != answers[1]
    assert all(mine["titles"] and residual["title"] for mine, residual, _ in answers)
    assert made == {"tries": 2, "choices": 2}
    # A request names the catalogue, and does not carry it.
    (request,) = asyncio.run(service.backend.build_lm_requests([InterpretQuery(history=["i3", "i4"])]))
    assert request.key.catalogue == service.backend.watcher.served.catalogue_version
    assert b"Title 7" not in pickle.dumps((request.key, request.task))

    # It is part of the check, so that a title that cannot be written is found before anybody asks.
    engines = LmEngines(service.config)
    engines.check(request.key, engines.load(request.key))
    add_item(ready_lm, " ".join(["Endless"] * 100))
    newer = replace(request.key, catalogue=Workspace(ready_lm).tables["items"].version())
    with pytest.raises(UsageError, match="The longest text takes"):
        engines.check(newer, engines.load(newer))


def test_what_cannot_be_put_into_words_is_told(service: LocalService) -> None:
    cases = [
        ("explain", {"user_id": "stranger"}, 404, "no_such_user"),
        ("explain", {"history": []}, 422, "nothing_known"),
        ("explain", {"history": ["unheard of"]}, 422, "nothing_known"),
        ("explain", {"user_id": "u1", "item_id": "unheard of"}, 422, "no_such_item"),
        ("explain", {"user_id": "u1", "focus": "x" * 101}, 422, "invalid"),
        ("explain", {"user_id": "u1", "history": []}, 422, "invalid"),
        ("explain/stream", {"user_id": "stranger"}, 404, "no_such_user"),
        ("interpret", {"history": []}, 422, "nothing_known"),
        ("residual", {"history": ["i1"]}, 422, "nothing_known"),
        ("summary", {"history": ["unheard of"]}, 422, "nothing_known"),
        ("summary", {"user_id": "stranger"}, 404, "no_such_user"),
        ("explain/batch", {"queries": [{"history": ["i1"]}] * 257}, 413, "too_much"),
    ]
    for route, body, status, code in cases:
        answer = service.post(route, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (route, body)
    assert service.post("interpret", {"history": ["i1"]}).status_code == 200
    assert service.post("oracle", {"history": ["i1"]}).status_code == 200


def test_a_release_without_words_says_so_and_recommends(ready: str, ready_lm: str) -> None:
    bare = LocalService(ready)
    refused = bare.post("explain", {"user_id": "u1"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_adapter")
    refused = bare.post("summary", {"history": ["i1"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_language_model")
    assert bare.get("release").json()["lm"] is None
    silent = LocalService(ready_lm, language={**SHORT, "replicas": 0})
    for route in ("explain", "interpret", "summary"):
        refused = silent.post(route, {"history": ["i1", "i2"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_language_model")
    assert silent.post("recommend", {"user_id": "u1"}).status_code == 200


def test_a_history_that_does_not_fit_is_refused_not_cut(ready_lm: str) -> None:
    recurrent = {**SHORT["summaries"], "paradigm": "recurrent"}
    service = LocalService(ready_lm, language={**SHORT, "summaries": recurrent}, limits={"blocks": 2})
    assert service.post("summary", {"history": ["i1"] * 10}).json()["summaries"].keys() == {"recurrent"}
    refused = service.post("summary", {"history": ["i1"] * 11})
    assert (refused.status_code, "at most 10 items" in refused.json()["error"]["message"]) == (413, True)


def test_the_histories_of_a_batch_share_a_bound_on_blocks(ready_lm: str) -> None:
    service = LocalService(ready_lm, language=SHORT, limits={"batch_blocks": 3})
    queries = [{"history": ["i1"] * length} for length in (10, 6, 5)]
    first, second, third = service.post("summary/batch", {"queries": queries}).json()["answers"]
    assert second == {"code": "too_much", "message": "Histories of a batch that are summed up have at most 15 items."}
    assert {*first["summaries"], *third["summaries"]} == {"hierarchical"}


class SlowEngine(EchoEngine):
    """Takes `SLOW_S` for whatever it is asked at a time."""

    def generate(self, *asked: Any) -> Iterator[Outcome]:
        time.sleep(SLOW_S)
        return super().generate(*asked)


def test_the_next_level_of_a_summary_that_nobody_waits_for_is_not_begun(ready_lm: str) -> None:
    engines = LmEngines(ServiceConfig(workspace=ready_lm))
    blocks = blocks_of([f"title number {number} of the catalogue" for number in range(20)], SummariesConfig())
    for wait_s, kind in ((60.0, UserSummary), (SLOW_S / 2, Failed)):
        pending = PendingTask(Summarize(blocks), time.time() + wait_s)
        (result,) = engines.answer(LoadedEngine(SlowEngine()), [pending])
        assert isinstance(result, kind)
    assert result == Failed("deadline", "Nobody waited any more.")


def test_an_explanation_that_does_not_fit_is_refused_not_cut(ready_lm: str) -> None:
    long = LocalService(ready_lm, language={**SHORT, "explanation": {"max_new_tokens": 500}})
    refused = long.post("explain", {"user_id": "u1"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_much")


def test_what_nobody_waits_for_any_more_is_not_begun(ready_lm: str) -> None:
    service = LocalService(ready_lm, language=SHORT, limits={"words_s": 1e-9})
    late = service.post("explain", {"user_id": "u1"})
    assert (late.status_code, late.json()["error"]["code"], late.headers["retry-after"]) == (503, "deadline", "1")


def test_an_adapter_that_is_not_as_stored_or_does_not_answer_is_refused(ready_lm: str, tmp_path: Path) -> None:
    store = Store(ready_lm)
    releases, models = Releases(store), Models(store)
    champion = releases.named("champion")
    assert champion is not None
    service = LocalService(ready_lm, language=SHORT)
    old = models.newest("recexplainer-h")
    assert old is not None
    folder = tmp_path / "adapter"
    shutil.copytree(store.local_path(f"{old.folder}/checkpoint"), folder)
    weights = load_file(folder / "adapter.safetensors")
    save_file({name: np.full_like(value, np.nan) for name, value in weights.items()}, folder / "adapter.safetensors")
    broken = models.add(old.name, folder, "broken", old.lineage)
    bad = releases.add(replace(champion, adapters={**champion.adapters, old.name: broken.hash}))
    releases.point("champion", bad)
    service.backend.watcher.poll()
    assert "recexplainer-h" in service.get("release").json()["refused"][bad.hash]
    assert service.get("release").json()["release"] == champion.hash
    assert service.post("explain", {"user_id": "u1"}).status_code == 200

    save_file({name: value * 2 for name, value in weights.items()}, folder / "adapter.safetensors")
    doubled = models.add(old.name, folder, "doubled", old.lineage)
    poisoned = releases.add(replace(champion, adapters={**champion.adapters, old.name: doubled.hash}))
    (store.local_path(f"{doubled.folder}/checkpoint") / "payload.py").write_bytes(b"boom")
    releases.point("champion", poisoned)
    service.backend.watcher.poll()
    assert "payload.py cannot be part of a model" in service.get("release").json()["refused"][poisoned.hash]
    assert service.post("explain", {"user_id": "u1"}).status_code == 200


def test_two_adapters_of_a_name_are_kept_those_that_were_used_last(ready_lm: str, tmp_path: Path) -> None:
    """Each is a whole copy of the language model."""
    models = Models(Store(ready_lm))
    first = models.newest("lancer")
    assert first is not None
    stored = [first]
    for number in range(2):
        folder = tmp_path / str(number)
        shutil.copytree(models.store.local_path(f"{first.folder}/checkpoint"), folder)
        weights = load_file(folder / "adapter.safetensors")
        save_file({name: value * (1.5 + number) for name, value in weights.items()}, folder / "adapter.safetensors")
        stored.append(models.add("lancer", folder, f"changed {number}", first.lineage))
    champion = Releases(Store(ready_lm)).named("champion")
    assert champion is not None
    engines = LmEngines(ServiceConfig(workspace=ready_lm, language=SHORT))
    a, b, c = (ModelKey(champion.lm, f"lancer/{model.hash}", champion.catalogue) for model in stored)
    gone = weakref.ref(engines.load(a).engine)
    engines.load(b)
    engines.load(ModelKey(champion.lm, f"recexplainer-h/{champion.adapters['recexplainer-h']}"))
    assert engines.get(a) is not None
    engines.load(c)
    assert [engines.get(key) is not None for key in (a, b, c)] == [True, False, True]
    assert engines.get(a) is not None
    engines.load(b)
    engines.load(c)
    assert [engines.get(key) is not None for key in (a, b, c)] == [False, True, True]
    gc.collect()
    assert gone() is None


def test_two_language_models_are_kept_and_each_once(ready_lm: str, tmp_path: Path) -> None:
    store = Store(ready_lm)
    champion = Releases(store).named("champion")
    assert champion is not None
    engines = LmEngines(ServiceConfig(workspace=ready_lm, language=SHORT))
    keys = engines.keys(champion, champion.catalogue)
    assert len(keys) == 6
    loaded = [engines.load(key) for key in keys]
    assert [engines.load(key) for key in keys] == [engines.get(key) for key in keys] == loaded
    others = []
    for number in range(2):
        folder = tmp_path / str(number)
        shutil.copytree(store.local_path(f"models/lm/{champion.lm}/checkpoint"), folder)
        config = json.loads((folder / "generation_config.json").read_text()) | {"max_length": 20 + number}
        (folder / "generation_config.json").write_text(json.dumps(config))
        others.append(ModelKey(Models(store).add("lm", folder, f"other {number}", {}).hash))
    engines.load(others[0])
    engines.load(keys[0])
    engines.load(others[1])
    assert [engines.get(key) is not None for key in (*keys, *others)] == [True] * 6 + [False, True]
    engines.load(others[0])
    assert [engines.get(key) for key in keys] == [None] * 6
