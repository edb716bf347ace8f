"""Samples of what `judge` judges: what an engine is shown of each, and what a rule that counts gives it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.language.adapters import read_card
from raypipe.language.titles import distinct_titles
from raypipe.metrics.explanations import unfounded
from raypipe.metrics.text import Vocabulary, item_values, rule_rating, value_counts
from raypipe.pipeline.cards import choose_users
from raypipe.pipeline.job import ModelCache
from raypipe.pipeline.loaded import Loaded, find_model
from raypipe.pipeline.summary_state import Catalogue
from raypipe.recommenders.ranking import target_ranks
from raypipe.recommenders.windows import Histories
from raypipe.storage.models import Models
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace
from raypipe.systems import explanations
from raypipe.systems.judges import Case
from raypipe.systems.summaries import SummariesConfig
from raypipe.systems.teacher import DISLIKED, LIKED

SUMMARY_PIECES = ("items", "summary")
EXPLANATION_PIECES = ("history", "item", "label", "decision", "explanation")


@dataclass(frozen=True)
class Sample:
    """Users, what an engine is shown of each, and the rule's rating."""

    users: list[str]
    cases: list[Case]
    rule: list[int | None]


def sample_summaries(workspace: Workspace, summaries: SummariesConfig, count: int) -> Sample:
    """The newest summaries of one paradigm; UsageError where there are none."""
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
    chosen, histories = choose_users(workspace, files, versions["histories"], count)
    catalogue = Catalogue(tables["items"].read(versions["items"]), summaries)
    vocabulary = Vocabulary(chain.from_iterable(catalogue.values))
    users, texts = chosen["user_id"].to_pylist(), chosen["summary"].to_pylist()
    cases: list[Case] = []
    rule: list[int | None] = []
    for user, summary in zip(users, texts, strict=True):
        window = histories[user][summaries.window_start(len(histories[user])) :]
        cases.append(dict(zip(SUMMARY_PIECES, ("\n".join(map(catalogue.line, window)), summary), strict=True)))
        counts = value_counts(catalogue.values[index] for index in window)
        rule.append(rule_rating(vocabulary.named(summary), counts))
    return Sample(users, cases, rule)


def sample_explanations(workspace: Workspace, cache: ModelCache, variant: str, count: int) -> Sample:
    """The newest explanations of one variant; what is right is what the recommender behind the adapter says.

    Raises UsageError where there are none.
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
    columns = ["user_id", "item_index", "decision", "text"]
    chosen, histories = choose_users(workspace, files, versions["histories"], count, "explanations", columns)
    adapter = find_model(Models(workspace.store), variant.removeprefix("explain-").removesuffix("-pairs"))
    loaded = Loaded.of(cache, workspace, read_card(cache.fetch(workspace, adapter)).recommender)
    titles = distinct_titles(loaded.items["title"].to_pylist(), loaded.items["item_id"].to_pylist())
    values = [tuple(sorted(item_values(dict(pairs)))) for pairs in loaded.items["attributes"].to_pylist()]
    names, kinds = Vocabulary(titles), Vocabulary(chain.from_iterable(values))
    cases: list[Case] = []
    rule: list[int | None] = []
    labels = _labels(loaded, [histories[user] for user in chosen["user_id"].to_pylist()], chosen["item_index"])
    for row, label in zip(chosen.to_pylist(), labels, strict=True):
        items, item, text = histories[row["user_id"]], row["item_index"], row["text"]
        history = [titles[one - 1] for one in items]
        shown = ("\n".join(history), titles[item - 1], label or "undecided", row["decision"], text)
        cases.append(dict(zip(EXPLANATION_PIECES, shown, strict=True)))
        found = unfounded(text, history, titles[item - 1], names)
        counts = value_counts(values[one - 1] for one in items)
        beside = bool(found.titles or found.quoted)
        rule.append(explanations.rule_rating(row["decision"], label, text, kinds, counts, values[item - 1], beside))
    return Sample(chosen["user_id"].to_pylist(), cases, rule)


@torch.no_grad()
def _labels(loaded: Loaded, histories: list[list[int]], items: pa.ChunkedArray) -> list[str | None]:
    """Whether each item is in the best fifth of what its user has not seen, yes, in the worse half, no, or between."""
    ends = np.cumsum([len(history) for history in histories])
    prefixes = Histories(np.concatenate([np.array(history, np.int32) for history in histories]), ends)
    above, _ = target_ranks(loaded.recommender, prefixes, items.to_numpy().astype(np.int32))
    unseen = loaded.recommender.items - np.array([len(set(history)) for history in histories])
    place: NDArray[np.float64] = above / np.maximum(unseen, 1)
    return ["yes" if one < LIKED else "no" if one >= DISLIKED else None for one in place.tolist()]
