"""A page that shows how a guided recommender uses attributes, and the share of the scores that each attribute makes up.

The page shows, for a few users, how they stand on each attribute, what is recommended to them and which attribute
speaks for it; and for each attribute the items at both ends.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import numpy as np
import torch
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.metrics.ranking import Mean
from raypipe.pipeline.forgotten import forgotten_keys, locked_traces
from raypipe.pipeline.loaded import Loaded
from raypipe.recommenders.attribute_scores import along, load_scores
from raypipe.recommenders.evaluation import HeldOut
from raypipe.recommenders.guided import contributions, user_rows
from raypipe.recommenders.ranking import sequences_of, top_lists
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import ModelCache
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.models import Models, find_model
from raypipe.storage.workspace import Workspace

_SHOWN_ITEMS = 5
_SHOWN_ENDS = 3
_HISTORY = "what was learnt of the history"
_SHARES_OF = 1_000
SHARE = "attribute share: "

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Attributes of {model}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }}
article {{ border: 1px solid #d5dae1; border-radius: 8px; padding: 1rem 1.25rem; margin: 1rem 0 }}
h2 {{ font-size: 1.05rem; margin: 0 0 .5rem }} h3 {{ font-size: .95rem; margin: .75rem 0 .25rem }} small {{ color: #5b6675 }}
.columns {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem }} ul {{ margin: 0; padding-left: 1.2rem }}
.bar {{ display: grid; grid-template-columns: 12rem 1fr 1fr 3.5rem; align-items: center; font-size: .9rem }}
.bar i {{ display: block; height: .7rem; background: #2f6fde; border-radius: 0 3px 3px 0 }}
.bar .minus {{ display: flex; justify-content: end; border-right: 1px solid #5b6675 }}
.bar .minus i {{ background: #b3541e; border-radius: 3px 0 0 3px }}
.bar span {{ overflow: hidden; text-overflow: ellipsis }} .bar span:last-child {{ text-align: right }}
@media (max-width: 48rem) {{ .columns {{ grid-template-columns: 1fr }} }}
</style></head><body><h1>Attributes of {model}</h1>
<p><small>{users}. A bar to the right is above the mean of all items, or speaks for an item; one to the left is below, or speaks
against it. Recommendations are those after all but the last event.</small></p>
{cards}
<h2>Both ends of every attribute</h2>
{attributes}
</body></html>
"""


def write_attribute_cards(
    config: ModelCache,
    workspace: Workspace,
    loaded: Loaded,
    held: HeldOut,
    count: int,
    lease_s: float,
    *,
    filter_seen: bool,
) -> str:
    """Write `evaluations/<model hash>/attributes.html` and return its URI.

    It shows `count` of the asked users, chosen by hash. Users who are forgotten meanwhile are left out. Raises
    UsageError for a model without guided scores, and for a control, whose columns are not those of the attributes.
    """
    guided = loaded.card.config.guided
    named = guided.scores
    if named is None:
        raise UsageError(
            f"{loaded.model.name}/{loaded.model.hash} has no guided scores to be drawn.",
            "Train one with --recommender.guided.scores, or leave out --cards.",
        )
    if guided.block != "scores":
        raise UsageError(
            f"{loaded.model.name}/{loaded.model.hash} is a control of --recommender.guided.block {guided.block}: its columns do "
            "not hold the scores of the attributes whose names they would bear.",
            "Draw one of --recommender.guided.block scores, or leave out --cards.",
        )
    models = Models(workspace.store)
    source = find_model(models, named)
    scores = load_scores(config.fetch(workspace, source), models.users(source))
    items, users = scores.normalised(loaded.card.config.guided.clip)
    titles = loaded.items["title"].to_pylist()
    prefixes = _chosen(held, count)
    lists = top_lists(loaded.recommender, prefixes, _SHOWN_ITEMS, filter_seen=filter_seen)
    parts = _parts(loaded.recommender, prefixes, lists, len(scores.names))
    assert prefixes.users is not None
    places, there = user_rows(torch.from_numpy(scores.keys), torch.from_numpy(prefixes.users))
    cards = []
    for at in range(len(prefixes)):
        mine = users[int(places[at])] if there[at] else None
        history = [titles[item - 1] for item in prefixes.items[prefixes.starts[at] : prefixes.ends[at]]]
        recommended = [(titles[item - 1], parts[at, rank]) for rank, item in enumerate(lists[at]) if item]
        standing = "" if mine is None else _standing(scores.names, mine, items, titles)
        cards.append(_card(at + 1, scores.names, history, standing, recommended))
    ends = {one["name"]: one for one in source.lineage["attributes"]}
    attributes = "\n".join(_ends(ends[name], items[:, column], titles) for column, name in enumerate(scores.names))
    path = Evaluations(workspace.store).page(loaded.model.hash)
    with locked_traces(workspace, "evaluate", lease_s):
        kept = list(compress(cards, ~np.isin(prefixes.users, forgotten_keys(workspace))))
        page = _PAGE.format(
            model=html.escape(f"{loaded.model.name}/{loaded.model.hash[:12]}"),
            users=f"{len(kept)} of {len(held.targets):,} users, chosen by hash",
            cards="\n".join(kept),
            attributes=attributes,
        )
        workspace.store.put(path, page.encode())
    return workspace.store.object_uri(path)


def attribute_shares(
    config: ModelCache, workspace: Workspace, loaded: Loaded, held: HeldOut, *, filter_seen: bool
) -> dict[str, Mean]:
    """The mean share of each attribute in the scores that decide on recommendations, by name.

    A user's share is the size of the attribute's part among the sizes of all parts, that of the history included, over
    the user's first recommendations. At most 1,000 users are measured, chosen by hash. Empty for a model without guided
    scores, and for a control, whose columns hold other items' scores, noise or nothing.
    """
    guided = loaded.card.config.guided
    if (named := guided.scores) is None or guided.block != "scores":
        return {}
    models = Models(workspace.store)
    source = find_model(models, named)
    names = load_scores(config.fetch(workspace, source), models.users(source)).names
    prefixes = _chosen(held, _SHARES_OF)
    lists = top_lists(loaded.recommender, prefixes, _SHOWN_ITEMS, filter_seen=filter_seen)
    sizes = np.abs(_parts(loaded.recommender, prefixes, lists, len(names)).astype(np.float64)).sum(1)
    sizes = sizes[sizes.sum(1) > 0]
    shares = sizes / sizes.sum(1, keepdims=True)
    return {f"{SHARE}{name}": Mean.of(shares[:, column]) for column, name in enumerate((_HISTORY, *names))}


def _chosen(held: HeldOut, count: int) -> Histories:
    """The prefixes of `count` of the asked users, by hash."""
    assert held.prefixes.users is not None
    chosen = np.argsort(held.prefixes.users.view(np.uint64), kind="stable")[:count]
    return held.prefixes.take(held.prefixes.starts[chosen], held.prefixes.lengths[chosen])


@torch.no_grad()
def _parts(model: Recommender, prefixes: Histories, lists: NDArray[np.int64], attributes: int) -> NDArray[np.float32]:
    """The parts that each recommendation's score is the sum of: [users, recommendations, 1 + attributes]."""
    known = prefixes.within(model.items)
    warm = np.flatnonzero(known.lengths)
    found = np.zeros((*lists.shape, 1 + attributes), np.float32)
    if len(warm):
        states = model.encode(sequences_of(known, warm, model.max_length))
        vectors = model.item_states()[torch.from_numpy(lists[warm])]
        pairs = states.repeat_interleave(lists.shape[1], 0), vectors.flatten(0, 1)
        found[warm] = contributions(*pairs, attributes).view(*vectors.shape[:2], -1).numpy()
    return found


def _card(
    number: int,
    names: Sequence[str],
    history: Sequence[str],
    standing: str,
    recommended: Sequence[tuple[str, NDArray[np.float32]]],
) -> str:
    largest = max((float(np.abs(parts).max()) for _, parts in recommended), default=1.0) or 1.0
    lists = "".join(
        f"<h3>{html.escape(title)} <small>{parts.sum():.2f}</small></h3>"
        + _bars(zip((_HISTORY, *names), parts.tolist(), strict=True), largest)
        for title, parts in recommended
    )
    recent = "".join(f"<li>{html.escape(title)}</li>" for title in history[-2 * _SHOWN_ITEMS :])
    return (
        f"<article><h2>User {number} <small>{len(history):,} events</small></h2>"
        f'<div class="columns"><div><small>Last {min(len(history), 2 * _SHOWN_ITEMS)} items</small><ul>{recent}</ul></div>'
        f"<div><small>As the language model sees the user</small>{standing or '<p>not scored</p>'}</div></div>"
        f"<h3>Recommended, and why</h3>{lists}</article>"
    )


def _standing(
    names: Sequence[str], mine: NDArray[np.float32], items: NDArray[np.float32], titles: Sequence[str]
) -> str:
    """A user's bars as HTML.

    With them come the items nearest to and farthest from the user on the attribute that stands out most.
    """
    strongest = int(np.abs(mine).argmax())
    nearest, farthest = along(items[:, strongest], float(mine[strongest]), _SHOWN_ENDS)
    bars = _bars(zip(names, mine.tolist(), strict=True), max(1.0, float(np.abs(mine).max())))
    return (
        f"{bars}<p><small>On {html.escape(names[strongest])}, nearest: {_listed(nearest, titles)}; farthest: "
        f"{_listed(farthest, titles)}</small></p>"
    )


def _ends(attribute: Mapping[str, str], column: NDArray[np.float32], titles: Sequence[str]) -> str:
    order = np.argsort(-column[1:], kind="stable") + 1
    return (
        f"<p>{html.escape(attribute['name'])} <small>{html.escape(attribute['description'])}</small><br>"
        f"<small>{html.escape(attribute['high'])}: {_listed(order[:_SHOWN_ENDS], titles)}<br>"
        f"{html.escape(attribute['low'])}: {_listed(order[::-1][:_SHOWN_ENDS], titles)}</small></p>"
    )


def _bars(named: Iterable[tuple[str, float]], largest: float) -> str:
    """Signed bars as HTML. A bar of size `largest` has the full width."""
    rows = []
    for name, value in named:
        bar = f'<i style="width:{100 * abs(value) / largest:.0f}%"></i>'
        sides = f'<div class="minus">{bar if value < 0 else ""}</div><div>{bar if value > 0 else ""}</div>'
        rows.append(f'<div class="bar"><span>{html.escape(name)}</span>{sides}<span>{value:+.2f}</span></div>')
    return "".join(rows)


def _listed(items: NDArray[np.int64], titles: Sequence[str]) -> str:
    return ", ".join(html.escape(titles[item - 1]) for item in items.tolist())
