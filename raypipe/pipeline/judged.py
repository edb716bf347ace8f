"""Samples of what `judge` judges: the texts that an engine is shown of each case, and the ratings of a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.language.adapters import read_card
from raypipe.language.titles import distinct_titles
from raypipe.metrics.explanations import coherence, distinction
from raypipe.metrics.text import Vocabulary, item_values, rule_summary_rating, value_counts
from raypipe.metrics.unfounded import Titles
from raypipe.pipeline.cards import choose_users
from raypipe.pipeline.explain_units import pair_keys
from raypipe.pipeline.loaded import Loaded
from raypipe.pipeline.sampling_seeds import user_seeds
from raypipe.pipeline.sequences import user_keys
from raypipe.pipeline.summary_state import PromptCatalogue, Recipes, summarised
from raypipe.pipeline.user_rows import are_standing, change_keys
from raypipe.recommenders.prefixes import prefix_states
from raypipe.recommenders.ranking import target_ranks
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import ModelCache
from raypipe.runtime.progress import say
from raypipe.storage.hashing import stable_hash
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace
from raypipe.systems import explanations
from raypipe.systems.judges import Case
from raypipe.systems.summaries import SummariesConfig
from raypipe.systems.teacher import DISLIKED, LIKED

SUMMARY_PIECES = ("items", "summary")
EXPLANATION_PIECES = ("history", "item", "label", "decision", "explanation")

FEWEST = 10
"""Least number of cases for a classifier or regressor: each of five folds then has two."""


@dataclass(frozen=True)
class Sample:
    """Users, what an engine is shown of each case, the rule's ratings, and figures of all cases together."""

    users: list[str]
    cases: list[Case]
    rule: list[int | None]
    figures: Mapping[str, float | None] = field(default_factory=dict)


def sample_summaries(workspace: Workspace, summaries: SummariesConfig, count: int) -> Sample:
    """A sample of the newest summaries of one paradigm that are of today's histories and items.

    The figure `stale` counts the others in the buckets read, None if no run in the ledger tells how to recognise them.
    Raises UsageError if there are no summaries to judge.
    """
    tables = workspace.tables
    versions = {name: tables[name].version() for name in ("items", "histories", "summaries")}
    files = []
    if ABSENT not in versions.values():
        files = tables["summaries"].files(versions["summaries"], variant=summaries.variant)
    if not files:
        raise UsageError(
            f"The workspace {workspace.uri} has no {summaries.paradigm} summaries.",
            "Run `raypipe summarize` first, or name the other with --summaries.paradigm.",
        )
    catalogue = PromptCatalogue(tables["items"].read(versions["items"]), summaries)
    recipes = _recipes(workspace, summaries.variant)

    def current(rows: pa.Table, owners: pa.Table, recipes: Recipes) -> pa.Array:
        users, _, blocks = summarised(owners, recipes, summaries, catalogue)
        return pa.array(are_standing(rows, users, blocks.change_key))

    standing = _Standing(None if recipes is None else partial(current, recipes=recipes))
    columns = ["user_id", "summary", "change_key"]
    chosen, histories, _ = choose_users(
        workspace, files, versions["histories"], count, "summaries", columns, standing.keep
    )
    if not chosen.num_rows:
        raise UsageError(
            f"No {summaries.paradigm} summary is of a history and items as they are now.",
            "Run `raypipe summarize` again, and give what it was told of blocks and windows to `judge` too, by --summaries.",
        )
    standing.tell("summaries")
    vocabulary = Vocabulary(chain.from_iterable(catalogue.values))
    users, texts = chosen["user_id"].to_pylist(), chosen["summary"].to_pylist()
    cases: list[Case] = []
    rule: list[int | None] = []
    for user, summary in zip(users, texts, strict=True):
        # Only the events that the summary is of. Those it leaves out tell nothing of how good it is.
        known = histories[user][: len(histories[user]) - summaries.hold_out]
        window = known[summaries.window_start(len(known)) :]
        cases.append(dict(zip(SUMMARY_PIECES, ("\n".join(map(catalogue.line, window)), summary), strict=True)))
        counts = value_counts(catalogue.values[index] for index in window)
        rule.append(rule_summary_rating(vocabulary.named(summary), counts))
    return Sample(users, cases, rule, {"stale": standing.figure})


def sample_explanations(workspace: Workspace, cache: ModelCache, variant: str, count: int) -> Sample:
    """A sample of the newest explanations of one variant that are of today's histories and items.

    What is right is decided by the recommender behind the adapter. The figure `stale` counts the others in the buckets
    read, None if no run in the ledger tells how to recognise them. Raises UsageError if there are no explanations to
    judge.
    """
    tables = workspace.tables
    versions = {name: tables[name].version() for name in ("items", "histories", "explanations")}
    files = []
    if ABSENT not in versions.values():
        files = tables["explanations"].files(versions["explanations"], variant=variant)
    if not files:
        raise UsageError(
            f"The workspace {workspace.uri} has no explanations {variant}.",
            "Run `raypipe explain` first, or name others with --explanations.",
        )
    columns = ["user_id", "item_index", "decision", "text", "change_key"]
    adapter, recipe = _who_explained(workspace, variant)
    contents = tables["items"].read(versions["items"], ["index", "content_hash"]).sort_by("index")["content_hash"]

    def current(rows: pa.Table, owners: pa.Table, recipe: str) -> pa.ChunkedArray:
        keys = change_keys(owners["history_key"].combine_chunks(), recipe)
        places = pc.index_in(rows["user_id"], value_set=owners["user_id"].combine_chunks())
        wanted = pair_keys(pa.chunked_array([keys]).take(places), rows["item_index"], contents.combine_chunks())
        return pc.equal(rows["change_key"], wanted)

    standing = _Standing(None if recipe is None else partial(current, recipe=recipe))
    chosen, histories, keys = choose_users(
        workspace, files, versions["histories"], count, "explanations", columns, standing.keep
    )
    if not chosen.num_rows:
        raise UsageError(
            f"No explanation {variant} is of a history and an item as they are now.", "Run `raypipe explain` again."
        )
    standing.tell("explanations")
    loaded = Loaded.of(cache, workspace, read_card(cache.fetch(workspace, adapter)).recommender)
    titles = distinct_titles(loaded.items["title"].to_pylist(), loaded.items["item_id"].to_pylist())
    values = [tuple(sorted(item_values(dict(pairs)))) for pairs in loaded.items["attributes"].to_pylist()]
    kinds = Vocabulary(chain.from_iterable(values))
    names = Titles(titles, kinds.values)
    cases: list[Case] = []
    rule: list[int | None] = []
    users, explained = chosen["user_id"].to_pylist(), chosen["item_index"].to_numpy().astype(np.int32)
    prefixes = _prefixes(chosen["user_id"].combine_chunks(), histories)
    # With the seeds of `recommend`, for recommenders that sample: what is right is what the published list says.
    seeds = user_seeds(chosen["user_id"].combine_chunks(), pa.array([keys[user] for user in users]))
    labels = _labels(loaded, prefixes, explained, seeds)
    shown_last = int(adapter.lineage["options"]["titles"])
    for row, label in zip(chosen.to_pylist(), labels, strict=True):
        items, item, text = histories[row["user_id"]], row["item_index"], row["text"]
        history = [titles[one - 1] for one in items]
        # An explanation may name titles of the whole history, but engines are shown the events that it was asked from.
        asked_from = "\n".join(history[-shown_last:])
        shown = (asked_from, titles[item - 1], label or "undecided", row["decision"], text)
        cases.append(dict(zip(EXPLANATION_PIECES, shown, strict=True)))
        found = names.unfounded(text, history, titles[item - 1])
        counts = value_counts(values[one - 1] for one in items[-shown_last:])
        beside = bool(found.unchosen or found.made_up)
        rule.append(
            explanations.rule_explanation_rating(row["decision"], label, text, kinds, counts, values[item - 1], beside)
        )
    decided = _decisions(chosen["decision"].to_pylist(), labels)
    told = _coherence(loaded, prefixes, explained, seeds, chosen["text"].to_pylist(), users)
    apart = _distinctions(workspace, versions["explanations"], variant, chosen)
    return Sample(users, cases, rule, {"stale": standing.figure, **decided, **told, **apart})


@dataclass
class _Standing:
    """Keeps rows that are of today's histories and items, and counts the others.

    `current` tells from rows and their users' histories which rows these are. If it is None, all rows are kept.
    """

    current: Callable[[pa.Table, pa.Table], pa.Array | pa.ChunkedArray] | None
    stale: int = 0

    @property
    def figure(self) -> int | None:
        return None if self.current is None else self.stale

    def keep(self, rows: pa.Table, owners: pa.Table) -> pa.Table:
        if self.current is None:
            return rows
        kept = rows.filter(self.current(rows, owners))
        self.stale += rows.num_rows - kept.num_rows
        return kept

    def tell(self, what: str) -> None:
        if self.stale:
            say(f"judge: {self.stale:,} {what} are of histories or items that have changed since, and left out")


def _recipes(workspace: Workspace, variant: str) -> Recipes | None:
    """How the newest run made the summaries of a variant; None if the ledger has no such run."""
    for run in workspace.ledger("summarize").finished():
        facts = run.manifest["facts"]
        if facts["variant"] == variant:
            return Recipes(variant, **facts["recipes"])
    return None


def _who_explained(workspace: Workspace, variant: str) -> tuple[Model, str | None]:
    """The adapter that wrote the published explanations, and its recipe.

    They are those of the newest run if the ledger has one, else the newest adapter of that name, and None.
    """
    recipe: str | None = None
    name = variant.removeprefix("explain-").removesuffix("-pairs")
    for run in workspace.ledger("explain").finished():
        facts = run.manifest["facts"]
        if facts["variant"] == variant:
            name, recipe = f"{name}/{facts['model']}", facts["recipe"]
            break
    return find_model(Models(workspace.store), name), recipe


def _prefixes(users: pa.Array, histories: Mapping[str, Sequence[int]]) -> Histories:
    """The histories of `users`, in their order."""
    mine = [histories[user] for user in users.to_pylist()]
    items = np.concatenate([np.array(history, np.int32) for history in mine])
    return Histories(items, np.cumsum([len(history) for history in mine]), user_keys(users))


def _labels(
    loaded: Loaded, prefixes: Histories, items: NDArray[np.int32], seeds: NDArray[np.int64]
) -> list[str | None]:
    """Each item's label by the recommender's ranking of what its user has not seen.

    It is "yes" in the best fifth, "no" in the worse half, and None in between.
    """
    above, _ = target_ranks(loaded.recommender, prefixes, items, seeds=seeds)
    # Items that came after the recommender are not among those that it ranks.
    known = prefixes.within(loaded.recommender.items)
    seen = [len(set(known.items[start:end])) for start, end in zip(known.starts, known.ends, strict=True)]
    place: NDArray[np.float64] = above / np.maximum(loaded.recommender.items - np.array(seen), 1)
    return ["yes" if one < LIKED else "no" if one >= DISLIKED else None for one in place.tolist()]


def _decisions(given: Sequence[str], labels: Sequence[str | None]) -> dict[str, float | None]:
    """How often the decision is what the recommender says, and how often a constant yes would be.

    Cases without a label of the recommender do not count.
    """
    pairs = [(mine, label) for mine, label in zip(given, labels, strict=True) if label is not None]
    figures: dict[str, float | None] = {
        "decision.cases": len(pairs),
        "decision.accuracy": None,
        "decision.constant": None,
    }
    if not pairs:
        return figures
    right, yes = sum(mine == label for mine, label in pairs), sum(label == "yes" for _, label in pairs)
    shares = {"decision.accuracy": right / len(pairs), "decision.constant": yes / len(pairs)}
    return {**figures, **{name: round(share, 4) for name, share in shares.items()}}


def _coherence(
    loaded: Loaded,
    prefixes: Histories,
    items: NDArray[np.int32],
    seeds: NDArray[np.int64],
    texts: Sequence[str],
    users: Sequence[str],
) -> dict[str, float | None]:
    """How well the recommender's score of the item is predicted from the words.

    It is the squared error, beside that of the mean score. Both are None if the explanations are of fewer than `FEWEST`
    users.
    """
    known = prefixes.within(loaded.recommender.items)
    rows = np.flatnonzero((known.lengths > 0) & (items <= loaded.recommender.items))
    of_rows = [users[row] for row in rows.tolist()]
    figures: dict[str, float | None] = {
        "coherence.users": len(set(of_rows)),
        "coherence.mse": None,
        "coherence.constant": None,
    }
    if len(set(of_rows)) < FEWEST:
        say(f"judge: coherence wants explanations of {FEWEST} users, and there are {len(set(of_rows))}")
        return figures
    scores = _scores(loaded, known, rows, items[rows], seeds[rows])
    found = coherence([texts[row] for row in rows.tolist()], scores, of_rows)
    return {**figures, "coherence.mse": round(found.mse, 6), "coherence.constant": round(found.constant, 6)}


@torch.no_grad()
def _scores(
    loaded: Loaded,
    prefixes: Histories,
    rows: NDArray[np.int64],
    items: NDArray[np.int32],
    seeds: NDArray[np.int64],
) -> NDArray[np.float32]:
    """The scores of one item [n] after each of the histories in `rows` [n], sampled by `seeds` [n]: float32 [n]."""
    model = loaded.recommender
    model.eval()
    states = torch.from_numpy(prefix_states(model, prefixes, rows, prefixes.lengths[rows]))
    asked = model.item_states()[torch.from_numpy(items.astype(np.int64))]
    return (model.queries(states, torch.from_numpy(seeds)) * asked).sum(1).numpy()


def _distinctions(workspace: Workspace, version: int, variant: str, chosen: pa.Table) -> dict[str, float | None]:
    """How well each other variant's explanations of the same pairs can be told from these."""
    table, buckets = workspace.tables["explanations"], workspace.require_info().buckets
    mine = set((stable_hash(chosen["user_id"].combine_chunks()) % np.uint64(buckets)).tolist())
    files = [file for file in table.files(version) if int(file.partition["bucket"]) in mine]
    columns = ["user_id", "item_index", "text"]
    texts = {(row["user_id"], row["item_index"]): row["text"] for row in chosen.select(columns).to_pylist()}
    figures: dict[str, float | None] = {}
    for other in sorted({file.partition["variant"] for file in table.files(version)} - {variant}):
        rows = table.read_files([file for file in files if file.partition["variant"] == other], columns).to_pylist()
        theirs = {(row["user_id"], row["item_index"]): row["text"] for row in rows}
        shared = [pair for pair in texts if pair in theirs]
        name = f"distinction.{other}"
        figures |= {f"{name}.cases": len(shared), f"{name}.accuracy": None, f"{name}.chance": None}
        if len(shared) < FEWEST:
            say(
                f"judge: {other} explains {len(shared)} of the {len(texts)} pairs judged, and telling it from {variant} wants "
                f"{FEWEST}"
            )
            continue
        found = distinction({variant: [texts[pair] for pair in shared], other: [theirs[pair] for pair in shared]})
        figures |= {f"{name}.accuracy": round(found.accuracy, 4), f"{name}.chance": found.chance}
    return figures
