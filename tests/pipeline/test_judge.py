"""`judge`: ratings of summaries by an endpoint beside the rule that counts, and what is kept of them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from raypipe.errors import UnavailableError
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.pipeline import forget, judge
from raypipe.pipeline.judged import sample_summaries
from raypipe.storage.locks import hold
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from raypipe.systems.summaries import SummariesConfig
from tests.conftest import Run
from tests.engines.chat_server import ChatServer
from tests.pipeline.small_logs import DAY, SMALL_ITEMS, SMALL_LOG, START, write_catalogue, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_an_endpoint_and_the_rule_rate_the_same_users(raypipe: Run, summarised: str) -> None:
    with ChatServer(answer=lambda prompt: f"{len(prompt) % 4} of 3" if len(prompt) % 5 else "no idea") as server:
        judges = {"endpoint": {"engine": "openai", "http": {"url": server.url, "model": "m"}}}
        ended = raypipe("judge", "--workspace", summarised, "--judges", json.dumps(judges), "--sample", "20")
        asked = server.prompts
    assert (ended.code, ended.status, ended.metrics["users"], len(asked)) == (0, "ok", 20, 20)
    assert (ended.metrics["cases"], ended.result["cost"]["calls"]) == (20, 20)
    (path,) = [entry.path for entry in Store(summarised).list("judgements")]
    report = json.loads(Store(summarised).read(path))
    ratings = report["ratings"]["endpoint"]
    assert sorted(ratings, key=str) == sorted(
        (len(prompt) % 4 if len(prompt) % 5 else None for prompt in asked), key=str
    )
    rated = [rating for rating in ratings if rating is not None]
    assert ended.metrics["endpoint.rated"] == len(rated) / 20
    assert ended.metrics["endpoint.mean"] == pytest.approx(sum(rated) / len(rated), abs=1e-4)
    assert ended.metrics["rule.rated"] == 1
    # The echo names the last words of the merge prompt, which are no genres.
    assert ended.metrics["rule.mean"] == 0
    assert all("Below is what one person chose" in prompt and "Summary: " in prompt for prompt in asked)
    assert report["judges"]["endpoint"]["http"]["model"] == "m"


def test_who_is_forgotten_while_judges_rate_is_in_no_judgement(
    raypipe: Run, summarised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sampled, asked = Store(summarised), judge.sample_summaries, judge.forgotten_users

    def forget_meanwhile(*given):
        sample = sampled(*given)
        assert "u7" in sample.users
        assert raypipe("forget", "--workspace", summarised, "--user", "u7").code == 0
        return sample

    def ask_under_the_lock(*given):
        with pytest.raises(UnavailableError), locked_at_once(store):
            pass
        return asked(*given)

    monkeypatch.setattr(judge, "sample_summaries", forget_meanwhile)
    monkeypatch.setattr(judge, "forgotten_users", ask_under_the_lock)
    ended = raypipe("judge", "--workspace", summarised)
    assert (ended.code, ended.metrics["users"]) == (0, 25)
    report = json.loads(store.read(f"judgements/{ended.result['run_key']}.json"))
    assert set(report["users"]) == {*(f"u{n}" for n in range(1, 25)), "long"} - {"u7"}
    assert len(report["users"]) == len(report["ratings"]["rule"]) == 24


def test_forgetting_takes_users_out_of_judgements_under_the_lock_of_who_writes_them(
    raypipe: Run, summarised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = []

    def sweep(store, users):
        with pytest.raises(UnavailableError), locked_at_once(store):
            pass
        swept.append(list(users))

    monkeypatch.setattr(forget, "forget_in_judgements", sweep)
    assert raypipe("forget", "--workspace", summarised, "--user", "u7").code == 0
    assert swept == [["u7"]]


def locked_at_once(store: Store) -> AbstractContextManager[object]:
    """The lock of what names users beside tables; UnavailableError where somebody holds it."""
    return hold(store, ["traces"], "somebody else")


def test_events_that_a_summary_leaves_out_are_not_shown_to_who_judges_it(raypipe: Run, summarised: str) -> None:
    left_out = ("--engine.engine", "echo", "--summaries.hold_out", "1")
    assert raypipe("summarize", "--workspace", summarised, *left_out).code == 0
    whole, cut = (sample_summaries(Workspace(summarised), SummariesConfig(hold_out=events), 100) for events in (0, 1))
    shown = {user: case["items"].splitlines() for user, case in zip(whole.users, whole.cases, strict=True)}
    assert len(cut.users) > 10
    for user, case in zip(cut.users, cut.cases, strict=True):
        assert case["items"].splitlines() == shown[user][:-1]


def test_summaries_of_events_and_items_that_have_changed_since_are_left_out_and_told(
    raypipe: Run, summarised: str, files: Path
) -> None:
    log = write_log(files / "more.csv", [("u7", "i1", START + 99 * DAY), ("stranger", "i1", START)])
    assert raypipe("ingest", "--workspace", summarised, "--log.path", log, "--log.columns.time", "time").code == 0
    ended = raypipe("judge", "--workspace", summarised)
    assert (ended.code, ended.metrics["cases"], ended.metrics["stale"]) == (0, 24, 1)
    assert "judge: 1 summaries are of histories or items that have changed since, and left out" in ended.stderr
    report = json.loads(Store(summarised).read(f"judgements/{ended.result['run_key']}.json"))
    assert "u7" not in report["users"]
    titles = {f"i{n}": f"Title {n}" for n in range(1, SMALL_ITEMS + 1)} | {"i2": "Another title"}
    words = ("ingest", "--workspace", summarised, "--catalogue.path", write_catalogue(files / "items.csv", titles))
    assert raypipe(*words).code == 0
    choosers = {user for user, item, _ in SMALL_LOG if item == "i2" and user != "long"}
    ended = raypipe("judge", "--workspace", summarised)
    report = json.loads(Store(summarised).read(f"judgements/{ended.result['run_key']}.json"))
    assert set(report["users"]) - {"long"} == {f"u{n}" for n in range(1, 25)} - choosers - {"u7"}

    narrower = raypipe("judge", "--workspace", summarised, "--summaries.window_events", 5)
    assert narrower.metrics["stale"] > ended.metrics["stale"]
    words = ("summarize", "--workspace", summarised, "--engine.engine", "echo")
    assert raypipe(*words).code == 0
    again = raypipe("judge", "--workspace", summarised)
    assert (again.metrics["cases"], again.metrics["stale"]) == (26, 0)
    # The one block of five events is the same, whatever a block may hold.
    longer = raypipe("judge", "--workspace", summarised, "--summaries.block_items", 50)
    short = {"stranger", *(f"u{n}" for n in range(1, 6))}
    assert (longer.metrics["cases"], longer.metrics["stale"]) == (len(short), 26 - len(short))
    facts = {"variant": "summarize-hierarchical", "recipes": {"block": "another", "merge": "another"}}
    manifest = {"recipe": "r", "pins": {}, "base": {}, "scope": "all", "facts": facts}
    run = Workspace(summarised).ledger("summarize").start("e" * 32, manifest)
    run.finish({"status": "ok", "metrics": {}, "tables": {}})
    none = raypipe("judge", "--workspace", summarised)
    assert (none.code, "No hierarchical summary is of a history and items as they are now" in none.stderr) == (2, True)
    Store(summarised).delete_folder("ledger/summarize")
    untold = raypipe("judge", "--workspace", summarised)
    assert (untold.metrics["cases"], untold.metrics["stale"]) == (26, None)


def test_a_workspace_without_summaries_says_what_to_run(raypipe: Run, ingested: str) -> None:
    none = raypipe("judge", "--workspace", ingested)
    assert (none.code, none.status) == (2, "failed")
    assert "has no hierarchical summaries" in none.stderr


def test_what_cannot_be_judged_is_told_before_anybody_is_asked(raypipe: Run, summarised: str) -> None:
    other = raypipe("judge", "--workspace", summarised, "--summaries.paradigm", "recurrent")
    assert "has no recurrent summaries" in other.stderr
    named = raypipe("judge", "--workspace", summarised, "--judges", json.dumps({"rule": {"engine": "echo"}}))
    assert named.code == 2
    assert "give the engine another name" in named.stderr
    own = raypipe("judge", "--workspace", summarised, "--judges", json.dumps({"own": {"lm": "builtin"}}))
    assert own.code == 2
    assert "has no language model of its own yet" in own.stderr
    hashed = raypipe("judge", "--workspace", summarised, "--judges", json.dumps({"own": {"lm": "builtin/77"}}))
    assert (hashed.code, "has no language model 77 of its own yet" in hashed.stderr) == (2, True)
    rubric = raypipe("judge", "--workspace", summarised, "--rubric.prompt", "How good is {x}?")
    assert rubric.code == 2
    assert "{x}, which there is not" in rubric.stderr


def test_one_of_several_language_models_of_the_workspace_judges_by_its_hash(
    raypipe: Run, summarised: str, tmp_path: Path
) -> None:
    models, contents = Models(Store(summarised)), {}
    tokenizer = train_tokenizer(["a word"] * 9, [], [], 300)
    for recipe, context in (("one", 256), ("two", 512)):
        save_untrained(tmp_path / recipe, BuiltinLmConfig(size="tiny", context=context), tokenizer)
        contents[models.add("lm", tmp_path / recipe, recipe, {}).hash] = checkpoint_hash(tmp_path / recipe)
    first, newest = (model.hash for model in models.all("lm"))
    judges = {"first": {"lm": f"builtin/{first[:8]}"}, "newest": {"lm": "builtin"}}
    asked = ("--judges", json.dumps(judges), "--sample", "1", "--rubric.decoding.max_new_tokens", "2")
    ended = raypipe("judge", "--workspace", summarised, *asked, "--rubric.prompt", "{summary}")
    assert ended.code == 0, ended.stderr
    report = json.loads(Store(summarised).read(f"judgements/{ended.result['run_key']}.json"))
    told = {name: identity["model"] for name, identity in report["judges"].items()}
    assert told == {"first": contents[first], "newest": contents[newest]}
    assert told["first"] != told["newest"]
