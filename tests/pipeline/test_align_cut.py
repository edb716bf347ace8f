"""What `align` teaches of recommenders' states ends before the cut: a title that only the future holds is in none of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from raypipe.errors import UsageError
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.prompt import Text
from raypipe.language.soft_prompts import SoftExample
from raypipe.language.templates import Templates
from raypipe.pipeline import align
from raypipe.pipeline.align_options import AlignConfig
from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.workspace import Workspace
from raypipe.systems.explainer_prompts import ExplainerPrompts
from tests.conftest import Run
from tests.pipeline.small_logs import DAY, START, newest, random_events, write_catalogue, write_log
from tests.systems.test_explainer_examples import is_asked_by, words_of
from tests.untrained import store_untrained

pytestmark = pytest.mark.usefixtures("ray_cluster")
PLANTED = "The Title That Only The Future Holds"
ITEMS, USERS = 30, 6
RECOMMENDER = RecommenderConfig(width=8, hidden=8, max_length=50, dropout=0.0)
CATALOGUE_TASKS = ("ranking", "interest", "explanation", "title", "titles", "attribute", "similar")
"""Of RecExplainer, whose prompts and answers name items that nobody need have chosen."""


def workspace_of(raypipe: Run, folder: Path, last: str) -> str:
    """Random histories, after which everybody chose the item `last`; the catalogue has the same items whichever that is. With
    summaries of all of it and of what is before the cut."""
    folder.mkdir()
    events = random_events(7, USERS, ITEMS, 90)
    ends = [(user, last, START + 10**4 * DAY) for user in {user for user, _, _ in events}]
    log = write_log(folder / "log.csv", [*events, *ends])
    titles = {f"i{n}": f"Title {n}" for n in range(1, ITEMS + 1)} | {"last": PLANTED}
    words = ("--log.path", log, "--log.columns.time", "time")
    uri = str(folder / "workspace")
    catalogue = ("--catalogue.path", write_catalogue(folder / "items.csv", titles))
    assert raypipe("ingest", "--workspace", uri, *words, *catalogue).code == 0
    for hold_out in (0, 1):
        asked = ("--engine.engine", "echo", "--summaries.hold_out", hold_out)
        assert raypipe("summarize", "--workspace", uri, *asked).code == 0
    store_untrained(uri, RECOMMENDER)
    return uri


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    titles = [PLANTED, *(f"Title {n}" for n in range(1, ITEMS + 1))]
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=512), train_tokenizer(titles * 5, [], [], 400))
    return folder


class PreparedError(UsageError):
    """Everything that a training would read is there: it need not be trained on."""


def learnt(
    raypipe: Run, monkeypatch: pytest.MonkeyPatch, uri: str, lm: Path, system: str, hold_out: int
) -> list[SoftExample]:
    """What `align` would train on."""
    found: list[SoftExample] = []

    def prepare(folder: Path, examples: Iterable[SoftExample], *rest: object) -> dict[str, int]:
        found.extend(examples)
        raise PreparedError("All is prepared.", "")

    monkeypatch.setattr(align, "prepare_alignment", prepare)
    words = ("--system", system, "--lm", lm, "--hold_out", hold_out, "--held_out_share", ".4", "--positions", 100)
    if system == "recexplainer":
        tasks = ("T1", "T2", "T3", "T4", "T5", "T6", "T6b", "explanation")
        named = "[" + ", ".join(f'"{task}"' for task in tasks) + "]"
        words = (*words, "--recexplainer.tasks", named, "--recexplainer.catalogue_lists", 2)
        words = (*words, "--summaries", "hierarchical", "--trainer.seed", 3)
    ended = raypipe("align", "--workspace", uri, *words)
    assert "All is prepared." in ended.stderr, ended.stderr
    return found


def holding(examples: Iterable[SoftExample]) -> list[SoftExample]:
    """Those that name what is planted."""
    return [example for example in examples if PLANTED in words_of(example.prompt) + "\n" + example.answer]


def content(examples: Iterable[SoftExample]) -> list[tuple[list[object], str]]:
    """Words and vectors as they are learnt, to be compared."""
    return [
        (
            [one.text if isinstance(one, Text) else one.values.tolist() for one in example.prompt.segments],
            example.answer,
        )
        for example in examples
    ]


@pytest.mark.parametrize("system", ["recinterpreter", "recexplainer"])
def test_a_unique_last_title_is_in_nothing_that_is_learnt_of_histories(
    raypipe: Run, tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """And whatever else came last, the very same examples are made: words, vectors and labels."""
    planted, other = (workspace_of(raypipe, tmp_path / last, last) for last in ("last", "i1"))
    examples = learnt(raypipe, monkeypatch, planted, lm, system, 1)
    prompts = ExplainerPrompts()
    asked = {
        name: value for name in type(prompts).model_fields if isinstance(value := getattr(prompts, name), Templates)
    }
    tasks = [
        {name for name, templates in asked.items() if is_asked_by(example.prompt, templates)} for example in examples
    ]
    if system == "recexplainer":
        # Every task is there, and none names the title but those that are about any item of the catalogue.
        assert set().union(*tasks) >= set(asked) - {"history_of_one"}
        of_histories = [
            example for example, names in zip(examples, tasks, strict=True) if not names & set(CATALOGUE_TASKS)
        ]
        assert len(of_histories) > USERS
        assert holding(examples)
        assert holding(of_histories) == []
    else:
        assert holding(examples) == []
    assert content(learnt(raypipe, monkeypatch, other, lm, system, 1)) == content(examples)

    # The search finds it where it is, and so would the comparison.
    whole = learnt(raypipe, monkeypatch, planted, lm, system, 0)
    if system == "recexplainer":
        assert holding([example for example in whole if is_asked_by(example.prompt, asked["history"])])
    assert len(holding(whole)) > len(holding(examples))
    assert content(learnt(raypipe, monkeypatch, other, lm, system, 0)) != content(whole)


def test_summaries_that_are_learnt_are_of_what_is_before_the_cut_and_of_the_user_they_stand_beside(
    raypipe: Run, tmp_path: Path, lm: Path
) -> None:
    uri = workspace_of(raypipe, tmp_path / "last", "last")
    workspace = Workspace(uri)
    version = workspace.tables["histories"].version()
    rows = newest(uri, "summaries").to_pylist()
    texts = {
        hold_out: {row["user_id"]: row["summary"] for row in rows if row["variant"] == variant}
        for hold_out, variant in ((0, "summarize-hierarchical"), (1, "summarize-hierarchical-cut1"))
    }
    assert all(len(set(mine.values())) > 1 for mine in texts.values())
    for hold_out, expected in texts.items():
        config = AlignConfig(
            workspace=uri,
            system="recexplainer",
            lm=str(lm),
            summaries="hierarchical",
            hold_out=hold_out,
            held_out_share=0.4,
        )
        source = align._read(config, workspace, version, None).source
        histories = newest(uri, "histories").sort_by("user_id")
        users, items = histories["user_id"].to_pylist(), histories["items"].to_pylist()
        for row, chosen in enumerate(items):
            assert source.before_cut(row) == chosen[: len(chosen) - hold_out]
        assert {users[row]: text for row, text in source.summaries.items()} == expected
        assert len(expected) == USERS
    assert not set(texts[0].values()) & set(texts[1].values())
