"""A workspace as a night leaves it, made in a second without Ray: its rows are computed by the jobs' own code."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raypipe.pipeline.extract import state_recipe
from raypipe.pipeline.recommender_rows import Recommendations, States
from raypipe.pipeline.user_rows import UserRows
from raypipe.recommenders.checkpoint import Card, catalogue_card, load_recommender, save_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.hashing import content_digest, digest_lanes, event_lanes, sequence_lanes, stable_hash, to_hex
from raypipe.storage.models import Models, find_model
from raypipe.storage.nights import Night, Nights
from raypipe.storage.releases import Release, Releases
from raypipe.storage.workspace import Workspace
from tests.pipeline.small_logs import CHAIN_ITEMS, GENRES, Event, chain_events

BUCKETS, LENGTH = 4, 5
MODEL = RecommenderConfig(model="sasrec", width=16, hidden=32, max_length=6, dropout=0)


def make_ready(uri: str, model: RecommenderConfig = MODEL) -> None:
    """The chains' users and items, an untrained recommender in force, and a night of it."""
    workspace = Workspace(uri)
    workspace.decide("time", BUCKETS)
    _publish(workspace, "items", [({}, _items())])
    events = chain_events()
    _write_histories(workspace, events)
    items = [f"i{n}" for n in range(1, CHAIN_ITEMS + 1)]
    counts = np.bincount([int(item[1:]) for _, item, _ in events], minlength=CHAIN_ITEMS + 1)
    popular = [int(item) for item in np.argsort(-counts, kind="stable") if item and counts[item]]
    with tempfile.TemporaryDirectory() as folder:
        users = sorted({user for user, _, _ in events}) if model.guided.used else []
        blocks = (4 if users else 0, len(users))
        weights = dict(model.build(CHAIN_ITEMS, seed=3, blocks=blocks).state_dict())
        if users:
            keys = np.sort(stable_hash(pa.array(users)).view(np.int64))
            weights["user_keys"] = torch.from_numpy(keys)
            weights["user_block"] = torch.randn(weights["user_block"].shape, generator=torch.Generator().manual_seed(1))
            weights["item_block"] = torch.randn(weights["item_block"].shape, generator=torch.Generator().manual_seed(2))
        save_recommender(Path(folder), Card(model, catalogue_card(items), popular, blocks), weights)
        lineage = {"job": "train", "hold_out": 2, "held_out_share": 0.0}
        stored = Models(workspace.store).add(model.model, Path(folder), "untrained", lineage)
    releases = Releases(workspace.store)
    version = workspace.tables["items"].version()
    releases.point("champion", releases.add(Release(f"{stored.name}/{stored.hash}", "", {}, version)))
    compute(uri)
    publish(uri, "2026-01-05")


def add_events(uri: str, events: Sequence[Event]) -> None:
    """As if a log had brought these too, and no job had run since."""
    _write_histories(Workspace(uri), [*chain_events(), *events])


def add_item(uri: str, title: str) -> None:
    """As if a catalogue had brought one more, and no job had run since."""
    workspace = Workspace(uri)
    table = workspace.tables["items"]
    rows = table.read(table.version()).to_pylist()
    item = f"i{len(rows) + 1}"
    rows.append(
        {**rows[-1], "item_id": item, "index": len(rows) + 1, "title": title, "content_hash": content_digest(item)}
    )
    _publish(workspace, "items", [({}, pa.Table.from_pylist(rows, table.spec.columns))])


def retell(uri: str, told: Mapping[str, Mapping[str, Any]]) -> None:
    """As if a catalogue had told other things of these items, by their ids, and no job had run since."""
    workspace = Workspace(uri)
    table = workspace.tables["items"]
    rows = [{**row, **told.get(row["item_id"], {})} for row in table.read(table.version()).to_pylist()]
    _publish(workspace, "items", [({}, pa.Table.from_pylist(rows, table.spec.columns))])


def compute(uri: str) -> None:
    """States, lists and summaries of everybody, by the release in force."""
    workspace = Workspace(uri)
    release = Releases(workspace.store).named("champion")
    assert release is not None
    name, content = release.recommender.split("/")
    models = Models(workspace.store)
    stored = find_model(models, release.recommender)
    folder = workspace.store.local_path(f"{stored.folder}/checkpoint")
    model, card = load_recommender(folder, users=models.users(stored))
    allowed = np.arange(CHAIN_ITEMS + 1) > 0
    kinds = {
        "hidden_states": (f"extract-{name}", state_recipe(content), States("last", False)),
        "recommendations": (
            f"recommend-{name}",
            "recipe",
            Recommendations(LENGTH, True, allowed, np.array(card.popular[:LENGTH], np.int32)),
        ),
    }
    version = workspace.tables["histories"].version()
    for table, (variant, recipe, rows) in kinds.items():
        parts = []
        for bucket in range(BUCKETS):
            state = UserRows(workspace, bucket, table, variant, recipe, version, -1)
            made = rows.warm(model, state.histories, np.arange(len(state.users)), state.seeds)
            place = made["place"]
            made = made.drop(["place"]).append_column("user_id", state.users.take(place))
            made = made.append_column("change_key", state.change_keys.take(place))
            parts.append(({"variant": variant, "bucket": bucket}, made))
        _publish(workspace, table, parts)
    summarize(uri, "summarize-hierarchical")


def summarize(uri: str, variant: str, what: str = "what comes next") -> None:
    """Of everybody, as if a language model had written that they like this."""
    workspace = Workspace(uri)
    version = workspace.tables["histories"].version()
    parts = []
    for bucket in range(BUCKETS):
        users = UserRows(workspace, bucket, "summaries", variant, "recipe", version, -1).users.to_pylist()
        columns = {
            "user_id": users,
            "summary": [f"{user} likes {what}." for user in users],
            "carry": [""] * len(users),
            "covered": [1] * len(users),
            "covered_key": [""] * len(users),
            "calls": [1] * len(users),
            "tokens_in": [1] * len(users),
            "tokens_out": [1] * len(users),
            "change_key": [""] * len(users),
        }
        schema = workspace.tables["summaries"].spec.columns
        parts.append(({"variant": variant, "bucket": bucket}, pa.table(columns, schema=schema)))
    _publish(workspace, "summaries", parts)


def publish(uri: str, date: str, summaries: str = "summarize-hierarchical") -> Night:
    """A night of the newest tables and the release in force, which names a variant of summaries."""
    workspace = Workspace(uri)
    release = Releases(workspace.store).named("champion")
    assert release is not None
    tables = {name: table.version() for name, table in workspace.tables.items() if table.version() >= 0}
    parts = {"release": release.hash, "recommender": release.recommender, "lm": release.lm}
    night = Night(date, tables, parts, {}, summaries)
    Nights(workspace.store).publish(night)
    return night


def _items() -> pa.Table:
    numbers = range(1, CHAIN_ITEMS + 1)
    columns = {
        "item_id": [f"i{n}" for n in numbers],
        "index": list(numbers),
        "title": [f"Title {n}" for n in numbers],
        "text": [""] * CHAIN_ITEMS,
        "attributes": [[("genre", [GENRES[(n - 1) % 5]])] for n in numbers],
        "content_hash": [content_digest(f"i{n}") for n in numbers],
        "available": [True] * CHAIN_ITEMS,
    }
    return pa.table(columns, schema=Workspace("unused").tables["items"].spec.columns)


def retitle(uri: str, index: int, title: str) -> None:
    """As if a catalogue had brought another title of an item that nobody has chosen: histories stay as they are."""
    workspace = Workspace(uri)
    table = workspace.tables["items"]
    rows = table.read(table.version()).to_pylist()
    for row in rows:
        if row["index"] == index:
            row |= {"title": title, "content_hash": content_digest(title)}
    _publish(workspace, "items", [({}, pa.Table.from_pylist(rows, schema=table.spec.columns))])


def _write_histories(workspace: Workspace, events: Sequence[Event]) -> None:
    by_user: dict[str, list[tuple[int, int]]] = {}
    for user, item, time in events:
        by_user.setdefault(user, []).append((time, int(item[1:])))
    lanes = digest_lanes(pa.array(["0" * 32] + [content_digest(f"i{n}") for n in range(1, CHAIN_ITEMS + 1)]))
    users = sorted(by_user)
    homes = (stable_hash(pa.array(users)) % np.uint64(BUCKETS)).tolist()
    parts = []
    for bucket in range(BUCKETS):
        mine = [user for user, home in zip(users, homes, strict=True) if home == bucket]
        lists = [sorted(by_user[user]) for user in mine]
        flat = np.array([pair for pairs in lists for pair in pairs], np.int64).reshape(-1, 2)
        keys = sequence_lanes(event_lanes(lanes[flat[:, 1]], flat[:, 0]), np.array([len(pairs) for pairs in lists]))
        columns = {
            "user_id": mine,
            "items": [[item for _, item in pairs] for pairs in lists],
            "times": [[time for time, _ in pairs] for pairs in lists],
            "seqs": [[0] * len(pairs) for pairs in lists],
            "weights": [[1.0] * len(pairs) for pairs in lists],
            "history_key": to_hex(keys),
        }
        parts.append(({"bucket": bucket}, pa.table(columns, schema=workspace.tables["histories"].spec.columns)))
    _publish(workspace, "histories", parts)


def _publish(workspace: Workspace, name: str, parts: Sequence[tuple[dict[str, str | int], pa.Table]]) -> None:
    table = workspace.tables[name]
    number = table.published_number("made") + 1
    columns = table.spec.columns
    staged = [
        table.stage(rows.select(columns.names).cast(columns), f"{number}-{at}", partition)
        for at, (partition, rows) in enumerate(parts)
    ]
    partitions = [partition for partition, _ in parts if partition]
    table.publish(staged, mode="overwrite", app="made", number=number, replaces=partitions)
