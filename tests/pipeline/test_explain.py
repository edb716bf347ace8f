"""`explain` on chains: what is new is put into words, what is not is carried over, and what cannot be is told or rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raypipe.cli.main import main
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.metrics.unfounded import Titles
from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.models import Models
from raypipe.storage.nights import Nights
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from raypipe.systems.explanations import contradicts
from tests.conftest import Run
from tests.engines.chat_server import ChatServer
from tests.ground import one_paragraph
from tests.made import retitle
from tests.pipeline.small_logs import CHAIN_ITEMS, EXPLAINER, GENRES, START, newest, write_catalogue, write_log
from tests.untrained import OF_LM, store_untrained

pytestmark = pytest.mark.usefixtures("ray_cluster")
# A tiny model leaves some out: those are asked for again.
SHORT = ("--decoding.max_new_tokens", "40", "--checks.retries", "6")


@pytest.fixture(scope="module")
def explaining_once(joined_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `joined_once`, with an adapter that explains, and recommendations."""
    uri = tmp_path_factory.mktemp("explaining") / "workspace"
    shutil.copytree(joined_once, uri)
    shared = ["--workspace", str(uri), "--tracking", "off"]
    assert main(["align", *shared, *EXPLAINER]) == 0
    assert main(["recommend", *shared, "--length", "3", "--cluster.workers", "1"]) == 0
    return uri


@pytest.fixture
def explaining(explaining_once: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(explaining_once, tmp_path / "explaining"))


def rows_of(uri: str, variant: str = "explain-recexplainer-h") -> dict[tuple[str, int], dict]:
    rows = [row for row in newest(uri, "explanations").to_pylist() if row["variant"] == variant]
    found = {(row["user_id"], row["item_index"]): row for row in rows}
    assert len(found) == len(rows), "a pair is there twice"
    return found


def test_a_language_model_predicts_what_the_recommender_does_and_controls_do_not(raypipe: Run, explaining: str) -> None:
    ended = raypipe("align", "--workspace", explaining, *EXPLAINER)  # stored, with the figures of its training
    assert (ended.code, ended.status) == (0, "nothing_to_do"), ended.stderr
    metrics = ended.metrics
    assert metrics["T1 HR@5 unseen"] >= metrics["T1 HR@5"] > 0.6
    assert metrics["T6 HCR"] > 0.2
    for name in ("T1 HR@5", "T6 HCR"):
        assert metrics[f"shuffled users: {name}"] < 0.5 * metrics[name]


def test_everybodys_top_recommendation_is_decided_and_put_into_words(raypipe: Run, explaining: str) -> None:
    ended = raypipe("explain", "--workspace", explaining, *SHORT)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    recommended = {row["user_id"]: row["items"][0] for row in newest(explaining, "recommendations").to_pylist()}
    rows = rows_of(explaining)
    assert ended.metrics["pairs"] == len(recommended) == 120
    assert set(rows) == set(recommended.items())
    assert {row["decision"] for row in rows.values()} <= {"yes", "no"}
    # How well a tiny model decides is for the golden tables; here, that what it decided is what is told.
    yes = sum(row["decision"] == "yes" for row in rows.values())
    assert ended.metrics["yes_share"] == pytest.approx(yes / 120, abs=1e-4)
    contradicting = sum(contradicts(row["decision"], row["text"]) for row in rows.values())
    assert ended.metrics["contradicting_share"] == pytest.approx(contradicting / 120, abs=1e-4)
    titles = Titles([f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)], GENRES)
    histories = {row["user_id"]: row["items"] for row in newest(explaining, "histories").to_pylist()}
    found = [
        titles.unfounded(row["text"], [f"Title {one}" for one in histories[user]], f"Title {item}")
        for (user, item), row in rows.items()
    ]
    for name, told in (("unchosen", [one.unchosen for one in found]), ("made_up", [one.made_up for one in found])):
        assert ended.metrics[f"{name}_share"] == pytest.approx(sum(map(bool, told)) / 120, abs=1e-4)
    assert sum("The choices are" in row["text"] for row in rows.values()) > 50
    assert ended.result["cost"]["calls"] >= 2 * 120
    written = Workspace(explaining).tables["explanations"]
    assert ended.metrics["bytes_written"] == sum(file.size for file in written.files(written.version()))
    assert ended.result["cost"]["tokens_out"] > 0

    again = raypipe("explain", "--workspace", explaining, *SHORT)
    assert (again.status, again.result["cost"]["calls"]) == ("nothing_to_do", 0)

    with ChatServer(answer=lambda prompt: "3" if "Recommended: yes" in prompt else "0") as server:
        judges = {"endpoint": {"engine": "openai", "http": {"url": server.url, "model": "m"}}}
        words = ("--what", "explanations", "--sample", "40", "--judges", json.dumps(judges))
        judged = raypipe("judge", "--workspace", explaining, *words)
    assert judged.code == 0, judged.stderr
    # What is recommended first is what the recommender says yes to.
    assert (judged.metrics["users"], judged.metrics["endpoint.mean"]) == (40, 3.0)
    wrong = 1 - yes / 120
    assert judged.metrics["rule.share_0"] == pytest.approx(wrong, abs=0.25)
    assert judged.metrics["rule.rated"] == 1
    # Who is decided about rightly is rated 1, and more where what is said of choices and item is right too, as of some it is.
    assert 0 < 1 - judged.metrics["rule.share_0"] < judged.metrics["rule.mean"]
    assert judged.metrics["coherence.users"] == 40
    assert judged.metrics["coherence.mse"] < 2 * judged.metrics["coherence.constant"]


def test_a_night_explains_what_is_new_alone(raypipe: Run, explaining: str, files: Path) -> None:
    assert raypipe("explain", "--workspace", explaining, *SHORT).code == 0
    before = rows_of(explaining)
    log = write_log(files / "more.csv", [("u1", "i5", START + 100)])
    catalogue = write_catalogue(files / "items.csv", CHAIN_ITEMS)
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    assert raypipe("ingest", "--workspace", explaining, *words).code == 0
    judge = ("judge", "--workspace", explaining, "--what", "explanations", "--sample", "120")
    judged = raypipe(*judge).metrics
    assert (judged["cases"], judged["stale"]) == (len(before) - 1, 1)
    assert raypipe("recommend", "--workspace", explaining, "--length", "3").code == 0
    ended = raypipe("explain", "--workspace", explaining, *SHORT)
    assert (ended.metrics["computed"], ended.metrics["unchanged"]) == (1, 119)
    after = rows_of(explaining)
    assert {pair: row for pair, row in after.items() if pair[0] != "u1"} == {
        pair: row for pair, row in before.items() if pair[0] != "u1"
    }
    assert len(after) == 120
    judged = raypipe(*judge).metrics
    assert (judged["cases"], judged["stale"]) == (120, 0)

    # An item has another title: why it is recommended is told anew.
    item = next(index for _, index in sorted(after))
    retitle(explaining, item, "Another title")
    renamed = raypipe("explain", "--workspace", explaining, *SHORT, "--max_reject_rate", "1")
    told = sum(index == item for _, index in after)
    assert renamed.metrics["computed"] + renamed.metrics["rejected"] == told
    assert renamed.metrics["unchanged"] == 120 - told < 120


def test_a_nights_explanations_are_planned_incremental_and_in_its_manifest(
    raypipe: Run, explaining: str, files: Path, tmp_path: Path
) -> None:
    once = ("--explain.decoding.max_new_tokens", 40, "--explain.checks.retries", 0, "--explain.max_reject_rate", 1)
    policy = ("--explain_policy", "nightly", *once)
    night = ("nightly", "--workspace", explaining, "--summarize.engine.engine", "echo", "--recommend.length", 3)
    plan = ("plan", "--workspace", explaining, "--engine.engine", "echo", "--sample_users", 200, *policy)
    early = raypipe(*plan)
    assert (early.code, "explain.calls" in early.metrics) == (0, False)
    assert "the release in force holds no adapter recexplainer-h: nothing would be explained" in early.stderr

    asked = ("--recommender", "sasrec", "--lm", "builtin", "--adapters", '["recexplainer-h"]')
    assert raypipe("release", "--workspace", explaining, *asked).code == 0
    # A newer language model is none of the adapter's: the night explains with the one that is.
    save_untrained(tmp_path / "lm", BuiltinLmConfig(size="tiny"), train_tokenizer(["a word"] * 9, [], [], 300))
    Models(Store(explaining)).add("lm", tmp_path / "lm", "newer", OF_LM)
    planned = raypipe(*plan)
    assert planned.code == 0, planned.stderr
    figures = {name.removeprefix("explain."): value for name, value in planned.metrics.items() if "explain." in name}
    assert (figures["pairs"], figures["pairs_changed"], figures["calls"]) == (120, 120, 240)
    assert (figures["tokens_out"], figures["seconds"], figures["tokens_out_most"]) == (None, None, 120 * 40)
    assert planned.result["cost"]["calls"] == planned.metrics["calls"] + 240
    assert Workspace(explaining).tables["explanations"].version() == -1

    first = raypipe(*night, *policy, "--date", "2026-01-05")
    assert (first.code, first.status) == (0, "ok"), first.stderr
    assert (
        first.metrics["explain.pairs"] == first.metrics["explain.computed"] + first.metrics["explain.rejected"] == 120
    )
    spent = Workspace(explaining).ledger("explain").newest().result()["cost"]
    assert (spent["calls"], spent["tokens_in"]) == (240, figures["tokens_in"])
    assert first.result["cost"]["calls"] == planned.result["cost"]["calls"]
    manifest = Nights(Store(explaining)).current()
    assert manifest.tables["explanations"] == first.result["tables"]["explanations"]["version"] == 0
    assert manifest.metrics["explain"]["pairs"] == 120
    assert Releases(Store(explaining)).named("champion").adapters

    again = raypipe(*night, *policy, "--date", "2026-01-06")
    assert (again.status, again.result["cost"]["calls"]) == ("nothing_to_do", 0)

    log = write_log(files / "more.csv", [("u1", "i5", START + 100)])
    more = ("--ingest.log.path", log, "--ingest.log.columns.time", "time")
    without = raypipe(*night, *more, "--date", "2026-01-06")
    assert not any(name.startswith("explain.") for name in without.metrics)
    told = raypipe(*plan).metrics
    assert (told["explain.pairs_changed"], told["explain.calls"]) == (1, 2)
    assert told["explain.seconds"] is not None
    second = raypipe(*night, *policy, "--date", "2026-01-07")
    assert second.status == "ok"
    assert second.metrics["explain.unchanged"] + second.metrics["explain.blocked"] == 119
    assert second.metrics["explain.computed"] + second.metrics["explain.rejected"] == 1

    # Who is asked with an eye on something else is asked anew, everybody of them.
    focused = raypipe(*plan, "--explain.focus", "genre").metrics
    assert (focused["explain.pairs_changed"], focused["explain.tokens_in"] > figures["tokens_in"]) == (120, True)


def test_a_night_that_cannot_explain_says_so_before_its_work(raypipe: Run, explaining: str) -> None:
    asked = ("--recommender", "sasrec", "--lm", "builtin", "--adapters", '["recexplainer-h"]')
    assert raypipe("release", "--workspace", explaining, *asked).code == 0
    night = ("nightly", "--workspace", explaining, "--summarize.engine.engine", "echo", "--explain_policy", "nightly")
    silent = raypipe(*night, "--explain.engine.engine", "echo")
    assert (silent.code, "The engine echo cannot tell how likely an answer is" in silent.stderr) == (2, True)
    assert Workspace(explaining).tables["summaries"].version() == -1


def test_pairs_of_a_file_are_explained_beside_and_strangers_told(raypipe: Run, explaining: str, files: Path) -> None:
    pairs = files / "pairs.csv"
    pairs.write_text("user_id,item_id\nu1,i3\nu1,i7\nu2,i3\nu1,i3\n")
    ended = raypipe("explain", "--workspace", explaining, "--pairs", pairs, *SHORT)
    assert (ended.metrics["pairs"], ended.metrics["computed"]) == (3, 3)
    assert set(rows_of(explaining, "explain-recexplainer-h-pairs")) == {("u1", 3), ("u1", 7), ("u2", 3)}
    focused = raypipe("explain", "--workspace", explaining, "--pairs", pairs, "--focus", "genre", *SHORT)
    # Another focus asks everybody anew; the tiny model may have no words for one of them.
    assert (focused.metrics["computed"] + focused.metrics["rejected"], focused.metrics["unchanged"]) == (3, 0)
    assert focused.metrics["computed"] > 0
    for text, problem in (
        ("user_id,item_id\nu1,nothing\n", "1 of 1 pairs of"),
        ("user_id,item_id\nnobody,i3\nu1,i3\n", "have a user_id that nobody knows here, for example 'nobody'"),
        ("user,item\nu1,i3\n", "cannot be read"),
        ("user_id,item_id\n", "has no pairs"),
    ):
        pairs.write_text(text)
        refused = raypipe("explain", "--workspace", explaining, "--pairs", pairs, *SHORT)
        assert refused.code == 2
        assert problem in one_paragraph(refused.stderr)


def test_what_does_not_fit_is_rejected_with_its_reason_and_stops_a_run_where_it_is_much(
    raypipe: Run, explaining: str
) -> None:
    long = ("--decoding.max_new_tokens", "95")
    stopped = raypipe("explain", "--workspace", explaining, "--decoding.max_new_tokens", "150")
    assert stopped.code == 1
    assert "more than max_reject_rate 20%. prompt_too_long: " in one_paragraph(stopped.stderr)
    ended = raypipe("explain", "--workspace", explaining, *long, "--max_reject_rate", "1")
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert ended.metrics["computed"] + ended.metrics["rejected"] == 120
    assert ended.metrics["rejected"] > 0
    rejects = newest(explaining, "rejects").to_pylist()
    assert len(rejects) == ended.metrics["rejected"]
    assert {row["reason"] for row in rejects} == {"prompt_too_long"}
    recommended = {row["user_id"]: row["items"][0] for row in newest(explaining, "recommendations").to_pylist()}
    for row in rejects:
        assert json.loads(row["row"]) == {"user_id": row["key"], "item_index": recommended[row["key"]]}

    # Rejected with one length of answer, they stay so until they are given another chance.
    blocked = raypipe("explain", "--workspace", explaining, *long, "--max_reject_rate", "1")
    assert blocked.status == "nothing_to_do"
    retried = raypipe("retry-rejected", "--workspace", explaining, "--table", "explanations")
    assert (retried.status, retried.metrics["retried"]) == ("ok", len(rejects))
    again = raypipe("explain", "--workspace", explaining, *long, "--max_reject_rate", "1")
    assert (again.metrics["rejected"], again.metrics["unchanged"]) == (len(rejects), ended.metrics["computed"])


def test_a_cap_leaves_the_rest_for_the_next_run_and_a_canary_publishes_nothing(raypipe: Run, explaining: str) -> None:
    canary = raypipe("explain", "--workspace", explaining, "--sample", "5", *SHORT)
    assert canary.metrics["computed"] == 5
    workspace = Workspace(explaining)
    assert workspace.tables["explanations"].version() == -1
    capped = raypipe("explain", "--workspace", explaining, "--max_calls", "80", *SHORT)
    assert 0 < capped.metrics["computed"] < 120
    assert capped.metrics["computed"] + capped.metrics["capped"] == 120
    assert capped.result["cost"]["calls"] <= 80
    rest = raypipe("explain", "--workspace", explaining, *SHORT)
    assert rest.metrics["unchanged"] == capped.metrics["computed"]
    assert len(rows_of(explaining)) == 120


def test_who_is_left_out_keeps_the_older_explanation_of_what_is_still_in_the_list(
    raypipe: Run, explaining: str, files: Path
) -> None:
    assert raypipe("explain", "--workspace", explaining, *SHORT).code == 0
    before = rows_of(explaining)
    log = write_log(files / "more.csv", [(f"u{n}", "i5", START + 100) for n in range(30)])
    assert raypipe("ingest", "--workspace", explaining, "--log.path", log, "--log.columns.time", "time").code == 0
    late = ("explain", "--workspace", explaining, *SHORT, "--deadline", "2020-01-01T00:00:00Z")
    ended = raypipe(*late)
    counts = ("computed", "unchanged", "capped", "stale")
    assert [ended.metrics[name] for name in counts] == [0, 90, 30, 30]
    assert rows_of(explaining) == before

    # What is denied by now is in nobody's list, and not explained any more either.
    denied = next(item for user, item in sorted(before) if user == "u1")
    denying = files / "deny.txt"
    denying.write_text(f"i{denied}\n")
    recommend = ("recommend", "--workspace", explaining, "--length", "3", "--deny", denying)
    assert raypipe(*recommend).code == 0
    raypipe(*late)
    listed = {row["user_id"]: row["items"] for row in newest(explaining, "recommendations").to_pylist()}
    kept = {pair: row for pair, row in before.items() if pair[1] in listed[pair[0]]}
    assert ("u1", denied) not in kept
    assert 0 < len(kept) < 120
    assert rows_of(explaining) == kept


def test_of_a_users_pairs_a_cap_leaves_the_older_explanations_of_those_it_left_out(
    raypipe: Run, explaining: str, files: Path
) -> None:
    pairs = files / "pairs.csv"
    pairs.write_text("user_id,item_id\nu1,i3\nu1,i7\nu2,i3\n")
    words = ("explain", "--workspace", explaining, "--pairs", pairs, *SHORT)
    assert raypipe(*words).metrics["computed"] == 3
    before = rows_of(explaining, "explain-recexplainer-h-pairs")
    log = write_log(files / "more.csv", [("u1", "i5", START + 100)])
    assert raypipe("ingest", "--workspace", explaining, "--log.path", log, "--log.columns.time", "time").code == 0
    # A pair may take eight calls, and takes two at least.
    capped = raypipe(*words, "--micro_batch", "1", "--max_calls", "8")
    counts = ("computed", "unchanged", "capped", "stale")
    assert [capped.metrics[name] for name in counts] == [1, 1, 1, 1], capped.stderr
    after = rows_of(explaining, "explain-recexplainer-h-pairs")
    assert after.keys() == before.keys()
    assert [pair for pair in after if after[pair]["change_key"] != before[pair]["change_key"]] == [("u1", 3)]


def test_what_cannot_explain_is_told_before_work_starts(raypipe: Run, explaining: str, with_lm: str) -> None:
    nothing = raypipe("explain", "--workspace", with_lm)
    assert (nothing.code, "No model recexplainer-h is stored" in nothing.stderr) == (2, True)
    unjudged = raypipe("judge", "--workspace", explaining, "--what", "explanations")
    assert (unjudged.code, "has no explanations explain-recexplainer-h" in unjudged.stderr) == (2, True)
    silent = raypipe("explain", "--workspace", explaining, "--engine.engine", "echo")
    assert (silent.code, "The engine echo cannot tell how likely an answer is" in silent.stderr) == (2, True)
    wrong = raypipe("explain", "--workspace", explaining, "--adapter", "sasrec")
    assert (wrong.code, "and one of recexplainer is asked for" in wrong.stderr) == (2, True)


def test_lists_of_another_recommender_of_the_same_name_are_not_explained(
    raypipe: Run, explaining: str, files: Path
) -> None:
    (mine,) = Models(Store(explaining)).all("sasrec")
    other = store_untrained(explaining, RecommenderConfig(width=16, hidden=32, max_length=6))
    assert raypipe("recommend", "--workspace", explaining, "--length", "3").code == 0
    asked = ("explain", "--workspace", explaining, *SHORT)
    refused = raypipe(*asked)
    assert (refused.code, refused.status) == (2, "failed")
    told = one_paragraph(refused.stderr)
    assert f"explains what sasrec/{mine.hash} recommends" in told
    assert f"the published lists recommend-sasrec are of sasrec/{other.hash}." in told
    assert f"Run `raypipe recommend --model sasrec/{mine.hash}` first" in told
    assert Workspace(explaining).tables["explanations"].version() == -1
    # Whose lists are published says nothing of pairs that are named.
    pairs = files / "pairs.csv"
    pairs.write_text("user_id,item_id\nu1,i3\n")
    assert raypipe(*asked, "--pairs", pairs).metrics["pairs"] == 1
    assert raypipe("recommend", "--workspace", explaining, "--length", "3", "--model", f"sasrec/{mine.hash}").code == 0
    ended = raypipe(*asked, "--sample", "5")
    assert (ended.code, ended.metrics["pairs"]) == (0, 5), ended.stderr


def test_nothing_is_explained_where_only_other_recommenders_have_recommended(raypipe: Run, explaining: str) -> None:
    workspace = Workspace(explaining)
    store_untrained(explaining, RecommenderConfig(model="gru4rec", width=16, hidden=32, max_length=6))
    shutil.rmtree(workspace.store.local_path("tables/recommendations"))
    shutil.rmtree(workspace.store.local_path("ledger/recommend"))
    assert raypipe("recommend", "--workspace", explaining, "--length", "3", "--model", "gru4rec").code == 0
    (mine,) = Models(Store(explaining)).all("sasrec")
    refused = raypipe("explain", "--workspace", explaining, *SHORT)
    assert (refused.code, refused.status) == (2, "failed")
    told = one_paragraph(refused.stderr)
    assert "no lists of that recommender are known here" in told
    assert f"Run `raypipe recommend --model sasrec/{mine.hash}` first, or name pairs with --pairs." in told
