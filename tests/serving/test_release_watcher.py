"""From one release and night to the next in a running service: checked first, switched at once, or refused."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from raypipe.errors import RaypipeError, UsageError
from raypipe.recommenders.checkpoint import load_recommender, save_recommender
from raypipe.recommenders.guided import GuidedOptions
from raypipe.serving.config import ServiceConfig
from raypipe.serving.release_watcher import ReleaseWatcher
from raypipe.serving.serve import ServeConfig, run_serve
from raypipe.storage.hashing import stable_hash
from raypipe.storage.models import Model, Models
from raypipe.storage.online import open_online_store
from raypipe.storage.releases import Release, Releases
from raypipe.storage.store import Store
from raypipe.storage.tokens import Tokens, hash_of
from tests.conftest import Run
from tests.made import MODEL, add_events, make_ready, publish
from tests.pipeline.small_logs import CHAIN_USERS, START
from tests.serving.local_service import LocalBackend, LocalService
from tests.serving.running import until


def changed(uri: str, folder: Path, change: float) -> Release:
    """The champion's recommender with its weights times `change`, as the release in force."""
    store = Store(uri)
    model = Models(store).newest("sasrec")
    assert model is not None
    source = store.local_path(f"{model.folder}/checkpoint")
    folder.mkdir(parents=True)
    (folder / "recommender.json").write_bytes((source / "recommender.json").read_bytes())
    weights = {
        name: (value * change).astype(value.dtype) for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors")
    stored = Models(store).add("sasrec", folder, "changed", model.lineage)
    return promoted(uri, f"sasrec/{stored.hash}")


def promoted(uri: str, recommender: str) -> Release:
    releases = Releases(Store(uri))
    champion = releases.named("champion")
    assert champion is not None
    release = releases.add(Release(recommender, champion.lm, {}, champion.catalogue))
    releases.point("champion", release)
    return release


def ranked_by_history(service: LocalService) -> list[str]:
    """The history of u1, once it is seen that the user and the history alone are recommended the same."""
    history = [item["item_id"] for item in service.get("users/u1").json()["history"]]
    by_user = service.post("recommend", {"user_id": "u1"}).json()["items"]
    by_history = service.post("recommend", {"history": history}).json()["items"]
    assert [item["item_id"] for item in by_user] == [item["item_id"] for item in by_history]
    scores = [item["score"] for item in by_history]
    assert [item["score"] for item in by_user] == pytest.approx(scores, rel=1e-5)
    return history


def test_a_new_release_and_a_rollback_are_taken_up_without_a_failed_request(
    raypipe: Run, ready: str, tmp_path: Path
) -> None:
    service = LocalService(ready)
    old = service.get("release").json()["release"]
    before = service.post("recommend", {"user_id": "u1"}).json()
    codes: set[int] = set()
    served: list[str] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            answer = service.post("recommend", {"user_id": "u1"})
            codes.add(answer.status_code)
            served.append(answer.json()["served"]["release"])

    thread = threading.Thread(target=load)
    thread.start()
    new = changed(ready, tmp_path / "new", 0.5)
    service.backend.watcher.poll()
    assert raypipe("release", "--workspace", ready, "--restore", old[:12]).code == 0
    service.backend.watcher.poll()
    stop.set()
    thread.join()
    assert codes == {200}
    assert set(served) <= {old, new.hash}
    assert service.get("release").json()["release"] == old
    assert service.post("recommend", {"user_id": "u1"}).json() == before


def test_a_release_of_another_width_is_taken_up_while_users_of_the_night_ask(ready: str, tmp_path: Path) -> None:
    service, store = LocalService(ready), Store(ready)
    model = Models(store).newest("sasrec")
    assert model is not None
    recommender, card = load_recommender(store.local_path(f"{model.folder}/checkpoint"))
    assert service.post("recommend", {"user_id": "u1"}).status_code == 200
    wider = card.config.model_copy(update={"width": 2 * recommender.width})
    save_recommender(tmp_path / "wider", replace(card, config=wider), wider.build(recommender.items).state_dict())
    stored = Models(store).add("sasrec", tmp_path / "wider", "wider", model.lineage)
    new = promoted(ready, f"sasrec/{stored.hash}")
    service.backend.watcher.poll()
    told = service.get("release").json()
    assert (told["release"], told["held_back"]) == (new.hash, {})
    ranked_by_history(service)


def test_states_of_another_recommender_are_not_used(ready: str, tmp_path: Path) -> None:
    service = LocalService(ready)
    changed(ready, tmp_path / "new", 0.5)
    service.backend.watcher.poll()
    ranked_by_history(service)


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_recommender_keeps_of_who_is_forgotten_is_dropped_without_a_restart(
    raypipe: Run, tmp_path: Path
) -> None:
    uri = str(tmp_path / "guided")
    make_ready(uri, MODEL.model_copy(update={"guided": GuidedOptions(scores="made up")}))
    assert raypipe("online", "--workspace", uri).code == 0
    service = LocalService(uri)
    before = service.post("recommend", {"user_id": "u2"}).json()["items"]
    hers = int(stable_hash(pa.array(["u1"])).view(np.int64)[0])
    assert hers in service.backend.watcher.served.recommender.user_keys.tolist()
    assert raypipe("forget", "--workspace", uri, "--user", "u1", "--grace_s", 0).metrics["rows_of_models_removed"] == 1
    service.backend.watcher.poll()
    keys = service.backend.watcher.served.recommender.user_keys.tolist()
    assert (hers in keys, len(keys)) == (False, CHAIN_USERS - 1)
    assert service.post("recommend", {"user_id": "u2"}).json()["items"] == before
    # With nobody forgotten the next night moves what is there.
    recommender = service.backend.watcher.served.recommender
    publish(uri, "2026-01-06")
    assert raypipe("online", "--workspace", uri).code == 0
    service.backend.watcher.poll()
    assert service.backend.watcher.served.target.night == "2026-01-06"
    assert service.backend.watcher.served.recommender is recommender


def test_a_user_whose_state_is_of_an_older_history_is_ranked_by_the_new_one(raypipe: Run, ready: str) -> None:
    """As where nights go on and extract something else: the variant that is loaded stays as it was."""
    add_events(ready, [("u1", "i20", START + 1000)])
    publish(ready, "2026-01-06")
    assert raypipe("online", "--workspace", ready).code == 0
    service = LocalService(ready)
    by_user = service.post("recommend", {"user_id": "u1"}).json()
    assert (by_user["served"]["night"], by_user["known"]) == ("2026-01-06", True)
    assert ranked_by_history(service)[-1] == "i20"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(np.nan, "weights that are no finite numbers", id="damaged weights"),
        pytest.param(1e37, "its lists are too short", id="scores that overflow"),
    ],
)
def test_a_release_that_does_not_answer_is_refused_and_the_old_one_stays(
    ready: str, tmp_path: Path, change: float, reason: str
) -> None:
    service = LocalService(ready)
    service.post("recommend", {"history": ["i1"], "only": {"genre": "War"}})
    old = service.get("release").json()["release"]
    bad = changed(ready, tmp_path / "bad", change)
    service.backend.watcher.poll()
    told = service.get("release").json()
    assert told["release"] == old
    assert reason in told["refused"][bad.hash]
    assert service.post("recommend", {"user_id": "u1"}).status_code == 200
    # A replica that starts now serves the one that was fit; one of a service that never ran has none.
    assert LocalBackend(ServiceConfig(workspace=ready)).watcher.served.target.release == old
    releases = Releases(Store(ready))
    releases.point("served", releases.get(bad.hash))
    with pytest.raises(RaypipeError, match=reason):
        run_serve(ServeConfig(workspace=ready))


def test_a_poisoned_model_is_refused(ready: str, tmp_path: Path) -> None:
    service = LocalService(ready)
    old = service.get("release").json()["release"]
    for number, (name, data) in enumerate((("payload.py", b"boom"), ("model.safetensors", b"\x80\x04pickle"))):
        release = changed(ready, tmp_path / f"poisoned{number}", 0.9 - number / 10)
        (Store(ready).local_path(f"models/{release.recommender}/checkpoint") / name).write_bytes(data)
        service.backend.watcher.poll()
        told = service.get("release").json()
        assert told["release"] == old
        assert release.hash in told["refused"]
    assert service.post("recommend", {"user_id": "u1"}).status_code == 200


def test_a_store_that_fails_once_costs_a_release_one_look(
    ready: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = LocalService(ready)
    old = service.get("release").json()["release"]
    new = changed(ready, tmp_path / "new", 0.5)
    with monkeypatch.context() as broken:

        def fail(models: Models, model: Model, cache: Path) -> Path:
            raise RaypipeError("The object store under s3://somewhere failed: 503 Slow Down", "Submit again.")

        broken.setattr(Models, "fetch_unharmed", fail)
        service.backend.watcher.poll()
    told = service.get("release").json()
    assert (told["release"], told["refused"]) == (old, {})
    assert told["held_back"] == {new.hash: "The object store under s3://somewhere failed: 503 Slow Down Submit again."}
    service.backend.watcher.poll()
    told = service.get("release").json()
    assert (told["release"], told["held_back"]) == (new.hash, {})


def test_what_keeps_failing_is_tried_ever_more_rarely_and_refuses_neither_release_nor_night(
    raypipe: Run, ready: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny = tmp_path / "deny.txt"
    deny.write_text("i1\n")
    service = LocalService(ready, deny=str(deny), watch_s=50)
    watcher, now = service.backend.watcher, time.monotonic()
    loads: list[float] = []
    load = watcher._load
    monkeypatch.setattr(watcher, "_load", lambda *what: loads.append(time.monotonic() - now) or load(*what))
    monkeypatch.setattr("raypipe.serving.release_watcher.time.monotonic", lambda: now)
    deny.unlink()
    add_events(ready, [("new", "i5", START + 1000)])
    publish(ready, "2026-01-06")
    assert raypipe("online", "--workspace", ready).code == 0
    for at_s in (0, 10, 20, 69, 71, 129, 132):
        monkeypatch.setattr("raypipe.serving.release_watcher.time.monotonic", lambda at_s=at_s: now + at_s)
        watcher.poll()
    # At once again after the first failure, and then after a minute at most.
    assert loads == pytest.approx([0, 10, 71, 132])
    told = service.get("release").json()
    assert (told["night"], told["refused"], list(told["held_back"])) == ("2026-01-05", {}, ["night 2026-01-06"])
    deny.write_text("i1\n")
    monkeypatch.setattr("raypipe.serving.release_watcher.time.monotonic", lambda: now + 200)
    watcher.poll()
    assert service.get("release").json()["night"] == "2026-01-06"


def test_another_night_of_the_release_and_catalogue_that_are_served_loads_no_model(
    raypipe: Run, ready: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny = tmp_path / "deny.txt"
    deny.write_text("i1\n")
    service = LocalService(ready, deny=str(deny))
    watcher = service.backend.watcher
    before, fetched, fetch = watcher.served, list[str](), Models.fetch_unharmed

    def count(models: Models, model: Model, cache: Path) -> Path:
        fetched.append(model.hash)
        return fetch(models, model, cache)

    monkeypatch.setattr(Models, "fetch_unharmed", count)
    add_events(ready, [("u1", "i2", START + 1000), ("new", "i5", START + 1000)])
    publish(ready, "2026-01-06")
    assert raypipe("online", "--workspace", ready).code == 0
    watcher.poll()
    assert (fetched, watcher.served.recommender is before.recommender) == ([], True)
    told = service.get("release").json()
    assert (told["night"], told["night_behind"]) == ("2026-01-06", False)
    assert told["since"] > before.since
    assert service.get("users/u1").json()["events"] == 10

    # Another deny list is another catalogue.
    deny.write_text("i1\ni2\n")
    publish(ready, "2026-01-07")
    watcher.poll()
    assert len(fetched) == 1
    items = service.post("recommend", {"history": ["i5"], "count": 20}).json()["items"]
    assert not {"i1", "i2"} & {item["item_id"] for item in items}


def test_a_release_that_is_refused_keeps_no_night_from_being_served(raypipe: Run, ready: str, tmp_path: Path) -> None:
    service = LocalService(ready)
    old = service.get("release").json()["release"]
    bad = changed(ready, tmp_path / "bad", np.nan)
    service.backend.watcher.poll()
    add_events(ready, [("new", "i5", START + 1000)])
    publish(ready, "2026-01-06")
    assert raypipe("online", "--workspace", ready).code == 0
    service.backend.watcher.poll()
    told = service.get("release").json()
    assert (told["release"], told["night"], list(told["refused"])) == (old, "2026-01-06", [bad.hash])


def test_states_of_a_night_that_was_published_again_with_another_recommender_are_not_used(
    ready: str, tmp_path: Path
) -> None:
    service = LocalService(ready)
    changed(ready, tmp_path / "new", 0.5)
    publish(ready, "2026-01-05")
    service.backend.watcher.poll()
    ranked_by_history(service)


def test_a_token_that_is_revoked_while_a_release_is_checked_is_refused_at_once(ready: str, tmp_path: Path) -> None:
    tokens, checking, go_on = Tokens(Store(ready)), threading.Event(), threading.Event()
    secret = tokens.make("shop", 10, 10)

    def check_slowly(release: str, catalogue: int) -> None:
        checking.set()
        assert go_on.wait(300)

    store = open_online_store(None, Store(ready))
    watcher = ReleaseWatcher(ServiceConfig(workspace=ready, watch_s=0.05), store, check_slowly)
    old, new = watcher.served.target.release, changed(ready, tmp_path / "new", 0.5)
    watcher.start()
    try:
        assert checking.wait(90)
        assert hash_of(secret) in watcher.tokens
        tokens.revoke("shop")
        until(lambda: not watcher.tokens)
        assert watcher.served.target.release == old
        go_on.set()
        until(lambda: watcher.served.target.release == new.hash)
    finally:
        go_on.set()
        watcher.stop()


def test_memory_is_given_back_after_a_switch_and_once_a_minute(
    ready: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    monkeypatch.setattr("raypipe.serving.release_watcher.return_memory", lambda: given.append(time.monotonic()))
    watcher = ReleaseWatcher(ServiceConfig(workspace=ready, watch_s=0.01), open_online_store(None, Store(ready)))
    changed(ready, tmp_path / "new", 0.5)
    watcher.poll()
    watcher.poll()
    assert len(given) == 1
    monkeypatch.setattr("raypipe.serving.release_watcher._MEMORY_S", 0.3)
    watcher.start()
    until(lambda: len(given) > 3)
    watcher.stop()
    assert min(later - sooner for sooner, later in pairwise(given)) >= 0.29


def test_a_workspace_without_a_release_is_told_before_anything_is_served(ready: str) -> None:
    Store(ready).delete(["releases/aliases/champion.json"])
    with pytest.raises(UsageError, match="No release is in force"):
        run_serve(ServeConfig(workspace=ready))
