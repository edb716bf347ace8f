"""`align` on a log in which every item is followed by the next: the state tells the history, and words can tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raypipe.language.adapters import read_card
from raypipe.storage.models import Models
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from tests.conftest import Run
from tests.engines.chat_server import ChatServer
from tests.pipeline.small_logs import CHAIN_ITEMS, CHAIN_TRAINING, EXPLAINER

pytestmark = pytest.mark.usefixtures("ray_cluster")
SMALL = (
    *("--recinterpreter.titles", "3", "--held_out_share", "0.25", "--recinterpreter.lora.rank", "16"),
    *("--trainer.epochs", "8", "--trainer.lr", "0.004", "--trainer.schedule", "linear", "--trainer.batch_size", "16"),
    *("--trainer.device", "cpu", "--recinterpreter.lora.dropout", "0", "--answer_tokens", "24"),
)


def test_words_tell_the_history_of_users_nobody_trained_on_and_controls_do_not(raypipe: Run, with_lm: str) -> None:
    ended = raypipe("align", "--workspace", with_lm, *SMALL)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    metrics = ended.metrics
    assert metrics["left_out"] == 0
    # Its recommender saw everybody, and the figures say so.
    assert metrics["unseen_by_all"] == 0
    assert "sasrec and lm may have been trained on users who are asked about here" in ended.stderr
    assert metrics["recovery"] > 0.5
    assert metrics["residual"] > 0.5
    for control in ("no states", "shuffled states"):
        assert metrics[f"{control}: recovery"] < 0.5 * metrics["recovery"]
        assert metrics[f"{control}: residual"] < 0.5 * metrics["residual"]
    store = Store(with_lm)
    model = Models(store).newest("recinterpreter")
    assert model is not None
    card = read_card(store.local_path(f"{model.folder}/checkpoint"))
    assert card.recommender.startswith("sasrec/")
    assert (model.lineage["recommender"], model.lineage["lm"]) == (card.recommender, card.lm)
    assert model.lineage["lm_model"] == f"lm/{Models(store).all('lm')[0].hash}"
    again = raypipe("align", "--workspace", with_lm, *SMALL)
    assert (again.status, again.result["models"]) == ("nothing_to_do", ended.result["models"])
    assert again.metrics == metrics
    told = raypipe("report", "--workspace", with_lm)
    assert told.code == 0, told.stderr
    (row,) = [
        line for line in Path(told.metrics["tables"]).read_text().splitlines() if line.startswith("| RecInterpreter |")
    ][:1]
    assert f"| {metrics['recovery']:.4f} ± " in row
    page = Path(told.metrics["page"]).read_text()
    assert "RecInterpreter, shuffled states" in page
    assert "users who may have been trained on" in page
    assert "<title>Recovery by position</title>" in page


def test_an_adapter_belongs_to_one_recommender_and_leaves_a_release_with_it(raypipe: Run, with_lm: str) -> None:
    few = (*SMALL, "--trainer.epochs", "4")
    ended = raypipe("align", "--workspace", with_lm, *few)
    releases = Releases(Store(with_lm))
    released = raypipe(
        "release",
        "--workspace",
        with_lm,
        "--recommender",
        "sasrec",
        "--lm",
        "builtin",
        "--adapters",
        '["recinterpreter"]',
    )
    assert released.code == 0, released.stderr
    assert releases.named("champion").adapters == ended.result["models"]

    other = raypipe("train", "--workspace", with_lm, *CHAIN_TRAINING, "--trainer.seed", "1")
    assert other.status == "ok", other.stderr
    # The same adapter on the states of a recommender it has never seen: they mean something else.
    moved = raypipe("align", "--workspace", with_lm, *few, "--adapter", "recinterpreter")
    assert (moved.status, moved.result["models"]) == ("ok", ended.result["models"]), moved.stderr
    assert moved.metrics["recovery"] < 0.7 * ended.metrics["recovery"]
    assert moved.metrics["no states: recovery"] == ended.metrics["no states: recovery"]

    # Held to the catalogue's titles the same adapter names nothing else, whatever it reads.
    held = raypipe("align", "--workspace", with_lm, *few, "--adapter", "recinterpreter", "--recinterpreter.constrained")
    assert held.result["models"] == ended.result["models"]
    for control in ("", "shuffled states: ", "no states: "):
        assert held.metrics[f"{control}valid"] == held.metrics[f"{control}residual valid"] == 1.0

    asked = ("--adapters", '["recinterpreter"]')
    refused = raypipe("release", "--workspace", with_lm, "--recommender", "sasrec", "--gate.least_share", 0, *asked)
    assert refused.code == 2
    assert "was trained beside" in refused.stderr
    without = raypipe("release", "--workspace", with_lm, "--recommender", "sasrec", "--gate.least_share", 0)
    assert without.code == 0, without.stderr
    assert "so the new release is without it" in without.stderr
    assert releases.named("champion").adapters == {}


def test_an_oracle_is_judged_by_the_rule_and_by_whoever_is_asked(raypipe: Run, with_lm: str) -> None:
    few = (*SMALL, "--trainer.steps", "3", "--asked", "10", "--recinterpreter.after", "item")
    content = Models(Store(with_lm)).all("lm")[-1].hash[:8]
    plain = raypipe("align", "--workspace", with_lm, *few, "--lm", f"builtin/{content}", "--recinterpreter.constrained")
    assert plain.code == 0, plain.stderr
    assert 0 <= plain.metrics["oracle preferred to random"] <= 1
    with ChatServer(answer=lambda prompt: "A" if prompt.rstrip().endswith("Letter:") else "none") as server:
        own = {"lm": f"builtin/{content}", "batch_tokens": 4096}
        judges = {"endpoint": {"engine": "openai", "http": {"url": server.url, "model": "m"}}, "own": own}
        again = (*few[:-2], "--adapter", "recinterpreter", "--recinterpreter.judges", json.dumps(judges))
        judged = raypipe("align", "--workspace", with_lm, *again)
        asked = server.prompts
    assert judged.code == 0, judged.stderr
    assert judged.result["models"] == plain.result["models"]
    assert all("A: Title " in prompt and "B: Title " in prompt for prompt in asked)
    # Constrained as it was when it was stored, so that no control names what nobody knows; a judge who always says A decides
    # by the order alone, which is the same for everybody who names something other than the rival.
    names = [name for name in judged.metrics if name.endswith("by endpoint")]
    assert len(names) == 7
    assert not any("oracle judged" in name for name in names)
    # The workspace's own names no letter for some pairs, which of them hangs on a processor's rounding; that is told then.
    own_names = {name.replace("judged beside", "preferred to") for name in judged.metrics if name.endswith("by own")}
    assert own_names == {name.replace("by endpoint", "by own") for name in names}
    assert judged.metrics["oracle preferred to random"] == plain.metrics["oracle preferred to random"]


def test_what_cannot_be_joined_is_told_before_work_starts(raypipe: Run, with_lm: str) -> None:
    nobody = raypipe("align", "--workspace", with_lm, "--held_out_share", "0.0001")
    assert (nobody.code, nobody.status) == (2, "failed")
    assert "are held out, and of those with two events" in nobody.stderr
    unknown = raypipe("align", "--workspace", with_lm, "--model", "gru4rec")
    assert "No model gru4rec is stored" in unknown.stderr
    words = (*EXPLAINER, "--recexplainer.tasks", '["T1", "T6b"]', "--summaries", "recurrent")
    summaries = raypipe("align", "--workspace", with_lm, *words)
    assert summaries.code == 2
    assert "--summaries.paradigm recurrent --summaries.hold_out 1` first" in summaries.stderr
    wrong = raypipe("align", "--workspace", with_lm, *SMALL, "--adapter", "sasrec")
    assert (wrong.code, "is no adapter, and one of recinterpreter is asked for" in wrong.stderr) == (2, True)
    other = raypipe("align", "--workspace", with_lm, *SMALL, "--lm", "builtin/77")
    assert (other.code, "has no language model 77 of its own yet" in other.stderr) == (2, True)
    narrow = raypipe("align", "--workspace", with_lm, *SMALL, "--recinterpreter.constrained", "--answer_tokens", 1)
    assert (narrow.code, "The longest text takes" in narrow.stderr) == (2, True)
    judges = ("--recinterpreter.judges", '{"echo": {"engine": "echo"}}')
    unread = raypipe("align", "--workspace", with_lm, *SMALL, *judges)
    assert (unread.code, "this adapter reads none" in unread.stderr) == (2, True)
    judges = ("--recinterpreter.after", "item", "--recinterpreter.judges", '{"own": {"lm": "builtin/77"}}')
    gone = raypipe("align", "--workspace", with_lm, *SMALL, *judges)
    assert (gone.code, "has no language model 77 of its own yet" in gone.stderr) == (2, True)
    lora = raypipe("align", "--workspace", with_lm, *SMALL, "--recinterpreter.lora.targets", '["c_attn"]')
    assert lora.code == 2
    assert "c_attn" in lora.stderr


def test_other_examples_are_learnt_too_and_a_file_that_holds_none_is_told(
    raypipe: Run, with_lm: str, tmp_path: Path
) -> None:
    replay = tmp_path / "replay.jsonl"
    replay.write_text(json.dumps({"prompt": "Say it.", "answer": "It."}) + "\n{}\n")
    # Its last option names its tasks; a list that is given twice would hold both.
    few = (*EXPLAINER[:-2], "--recexplainer.tasks", '["T4", "T5"]', "--trainer.epochs", "1", "--asked", "2")
    told = raypipe("align", "--workspace", with_lm, *few, "--replay", replay)
    assert told.code == 2
    assert f"Line 2 of {replay} is no example: it has no prompt and no answer, and no messages." in told.stderr
    turns = [("user", "Say it."), ("assistant", "It."), ("user", "Again."), ("assistant", "It.")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    replay.write_text("\n".join(map(json.dumps, ({"prompt": "Say it.", "answer": "It."}, chat))))
    with_replay = raypipe("align", "--workspace", with_lm, *few, "--replay", replay)
    # Of each item its title, its genre and its nearest; and what the file holds.
    assert with_replay.metrics["examples"] == 3 * CHAIN_ITEMS + 3
