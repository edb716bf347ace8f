"""`align --system trsr` from a log to ranks of stored candidates, beside what ranks the same ones without a language model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raypipe.cli.main import main
from raypipe.language.alignment import prepare_alignment
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.pipeline import trsr
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.systems.candidate_facts import FORM
from raypipe.systems.trsr import TrsrConfig
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.pipeline.small_logs import START, newest, write_catalogue, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")
ITEMS, USERS, EVENTS = 60, 40, 8
LAST = "Unmistakable"
TERSE = "likes {summary} now {recent} next {candidate} ?"
TRAINING = (
    *("--recommender.width", "8", "--recommender.hidden", "16", "--recommender.max_length", "8"),
    *("--recommender.dropout", "0", "--trainer.batch_size", "16", "--trainer.lr", "0.01"),
    *("--trainer.warmup_steps", "2", "--trainer.steps", "20", "--trainer.device", "cpu", "--hold_out", "1"),
)
ALIGN = (
    *("--system", "trsr", "--trsr.prompt", TERSE, "--positions", "2", "--trainer.batch_size", "16"),
    *("--trainer.steps", "12", "--trainer.lr", "0.01", "--trainer.warmup_steps", "2", "--trainer.device", "cpu"),
)


def events() -> list[tuple[str, str, int]]:
    """Each item is followed by the next one. Everybody's last is one that nobody chose before; and one user chose twice."""
    rows = [
        (f"u{user}", f"i{(7 * user + place) % (ITEMS - 1) + 1}", START + place)
        for user in range(USERS)
        for place in range(EVENTS - 1)
    ]
    rows += [(f"u{user}", f"i{ITEMS}", START + EVENTS) for user in range(USERS)]
    return [*rows, ("short", "i1", START), ("short", "i2", START + 1)]


@pytest.fixture(scope="module")
def ranked_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log, a recommender, recurrent summaries, and a language model that is not trained and has seen nobody."""
    folder = tmp_path_factory.mktemp("ranked")
    titles = {f"i{n}": f"Title {n}" if n < ITEMS else LAST for n in range(1, ITEMS + 1)}
    shared = ["--workspace", str(folder / "workspace"), "--tracking", "off"]
    words = ["--log.path", str(write_log(folder / "log.csv", events())), "--log.columns.time", "time"]
    words += ["--catalogue.path", str(write_catalogue(folder / "items.csv", titles)), "--cluster.workers", "1"]
    assert main(["ingest", *shared, *words]) == 0
    assert main(["train", *shared, *TRAINING]) == 0
    summaries = ["--summaries.paradigm", "recurrent", "--summaries.hold_out", "1", "--cluster.workers", "1"]
    assert main(["summarize", *shared, "--engine.engine", "echo", *summaries]) == 0
    facts = [FORM.replace("{}", str(number)) for number in range(10)]
    texts = [*titles.values(), TERSE, TrsrConfig().prompt, " yes no NULL title: genre: Drama", *facts]
    tokenizer = train_tokenizer([" ".join(texts)] * 5, ["yes", "no"], [], 700)
    save_untrained(folder / "lm", BuiltinLmConfig(size="tiny", context=512), tokenizer)
    store = Models(Store(str(folder / "workspace")))
    store.add("lm", folder / "lm", "untrained", {"hold_out": 1, "held_out_share": 0.1})
    return folder / "workspace"


@pytest.fixture
def ranked(ranked_once: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(ranked_once, tmp_path / "workspace"))


def test_everybody_s_candidates_are_ranked_by_all_and_models_are_compared_user_by_user(
    raypipe: Run, ranked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[str] = []

    def watched(folder, examples, *rest):
        some = list(examples)
        learnt.extend(example.prompt.text for example in some)
        return prepare_alignment(folder, some, *rest)

    monkeypatch.setattr(trsr, "prepare_alignment", watched)
    words = ("align", "--workspace", ranked, *ALIGN)
    plain = raypipe(*words, "--beside", "--trsr.facts")
    assert (plain.code, plain.status) == (0, "ok"), plain.stderr
    metrics = plain.metrics
    # All who have two events before the last one, whoever is held out from training among them.
    assert (metrics["asked"], metrics["refused"]) == (USERS, 0)
    rankers = ("", "popularity: ", "transitions: ", "sasrec: ", "boosted trees: ", "boosted trees on facts: ")
    for name in rankers:
        assert 0 <= metrics[f"{name}MRR@3"] <= metrics[f"{name}Recall@3"] <= metrics[f"{name}Recall@10"] <= 1
        assert metrics[f"{name}seconds"] >= 0
    # Nobody chose it before the cut: what counts alone puts it last.
    assert metrics["popularity: Recall@3"] == 0
    assert metrics["tokens_asked"] > USERS * 21
    # What is held out, which has a title of its own, is in no training text but as a candidate that was not chosen.
    assert len(learnt) == metrics["examples"]
    assert not any(LAST in text.split(" next ")[0] for text in learnt)
    (path,) = Path(ranked).glob("candidates/*.parquet")
    stored = pq.read_table(path)
    assert stored.num_rows == USERS
    assert {len(items) for items in stored["items"].to_pylist()} == {21}
    chosen = [
        items[place] for items, place in zip(stored["items"].to_pylist(), stored["place"].to_pylist(), strict=True)
    ]
    indices = {row["title"]: row["index"] for row in newest(ranked, "items").to_pylist()}
    assert set(chosen) == {indices[LAST]}

    told = raypipe(*words, "--beside", "--trsr.facts")
    assert (told.status, told.result["models"]) == ("nothing_to_do", plain.result["models"])

    named = f"trsr/{plain.result['models']['trsr']}"
    shown = raypipe(*words, "--trsr.facts", "--summaries", "recurrent", "--trsr.against", named)
    assert (shown.code, shown.status) == (0, "ok"), shown.stderr
    assert shown.metrics["summary_calls"] > 0
    assert {"no summaries: Recall@3", "shuffled summaries: Recall@3"} <= set(shown.metrics)
    assert shown.metrics["popularity: MRR@3"] == metrics["popularity: MRR@3"]
    apart = f"above {named.removeprefix('trsr/')[:12]}: Recall@3"
    assert shown.metrics[apart] == pytest.approx(shown.metrics["Recall@3"] - metrics["Recall@3"], abs=1e-3)
    assert shown.metrics[f"{apart} low"] <= shown.metrics[apart] <= shown.metrics[f"{apart} high"]

    # A stored one is asked again with less to go by.
    again = raypipe(*words, "--adapter", named)
    assert again.metrics["MRR@3"] == metrics["MRR@3"]
    bare = raypipe(*words, "--adapter", named, "--trsr.recent", 0)
    assert bare.metrics["tokens_asked"] < 0.9 * again.metrics["tokens_asked"]

    anew = raypipe(*words, "--trsr.candidates.seed", 1, "--trsr.against", named)
    assert anew.code == 2
    assert "ranked other candidates" in one_paragraph(anew.stderr)


def test_the_epoch_that_ranks_best_is_kept(raypipe: Run, ranked: str) -> None:
    words = ("align", "--workspace", ranked, *ALIGN, "--trainer.steps", 8, "--trainer.validate_every", 1)
    ended = raypipe(*words)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert 0 <= ended.metrics["validation_recalls"] <= 3


def test_what_has_read_the_answers_or_cannot_be_asked_is_refused(raypipe: Run, ranked: str) -> None:
    cases = {
        ("--hold_out", "0"): "none is left to ask for",
        ("--hold_out", "2"): "may have read all but the last 1 events",
        ("--summaries", "hierarchical"): "no hierarchical summaries without the last 1 events",
        ("--summaries", "recurrent", "--trsr.block_items", "3"): "are not of blocks of 3",
        ("--trsr.candidates.negatives", "58"): "leaves 58 items unseen",
        ("--adapter", "sasrec"): "is none of this system",
        ("--trsr.against", "trsr/0"): "No model trsr/0 is stored",
    }
    for options, problem in cases.items():
        ended = raypipe("align", "--workspace", ranked, *ALIGN, *options)
        assert ended.code == 2, options
        assert problem in one_paragraph(ended.stderr)
