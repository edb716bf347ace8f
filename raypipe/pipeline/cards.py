"""User cards: one page that shows, for a few users, what they did and what was written about them."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.metrics.text import item_values, value_counts
from raypipe.storage.hashing import stable_hash
from raypipe.storage.tables import ABSENT, StagedFile
from raypipe.storage.workspace import Workspace
from raypipe.systems.summaries import SummariesConfig

_SHOWN_ITEMS = 10
_SHOWN_VALUES = 6

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Night of {date}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }}
article {{ border: 1px solid #d5dae1; border-radius: 8px; padding: 1rem 1.25rem; margin: 1rem 0 }}
h2 {{ font-size: 1.05rem; margin: 0 0 .5rem }} blockquote {{ margin: 0 0 .75rem; padding-left: .8rem; border-left: 3px solid #2f6fde }}
.columns {{ display: grid; grid-template-columns: 3fr 2fr; gap: 1.5rem }} ol {{ margin: 0; padding-left: 1.4rem }}
.bar {{ display: grid; grid-template-columns: 8rem 1fr 2.5rem; gap: .5rem; align-items: center; font-size: .9rem }}
.bar i {{ display: block; height: .7rem; background: #2f6fde; border-radius: 3px }} small {{ color: #5b6675 }}
@media (max-width: 40rem) {{ .columns {{ grid-template-columns: 1fr }} }}
</style></head><body><h1>Night of {date}</h1>
<p><small>{users:,} users have a summary; {shown} of them, chosen by hash.</small></p>
{cards}
</body></html>
"""


def write_cards(
    workspace: Workspace, date: str, versions: Mapping[str, int], count: int, summaries: SummariesConfig
) -> str:
    """Write `nights/<date>/cards.html` from the night's own table versions, and return its URI."""
    items = workspace.tables["items"].read(versions["items"]).sort_by("index")
    titles = items["title"].to_pylist()
    attributes = [dict(pairs) for pairs in items["attributes"].to_pylist()]
    files = workspace.tables["summaries"].files(versions.get("summaries", ABSENT), variant=summaries.variant)
    users, history, _ = choose_users(workspace, files, versions["histories"], count)
    cards = [
        _card(
            user,
            summary,
            [titles[i - 1] for i in history[user]],
            [attributes[i - 1] for i in history[user][summaries.window_start(len(history[user])) :]],
        )
        for user, summary in zip(users["user_id"].to_pylist(), users["summary"].to_pylist(), strict=True)
    ]
    page = _PAGE.format(
        date=date,
        users=sum(file.rows for file in files),
        shown=len(cards),
        cards="\n".join(cards),
    )
    path = f"nights/{date}/cards.html"
    workspace.store.put(path, page.encode())
    return workspace.store.object_uri(path)


def choose_users(
    workspace: Workspace,
    files: Sequence[StagedFile],
    histories: int,
    count: int,
    table: str = "summaries",
    columns: Sequence[str] = ("user_id", "summary"),
    keep: Callable[[pa.Table, pa.Table], pa.Table] = lambda rows, owners: rows,
) -> tuple[pa.Table, dict[str, list[int]], dict[str, str]]:
    """`count` rows of a table at most, and the items and history keys of their users, by user id.

    Only as many buckets are read as it takes to find them, so that millions of users are not read. `keep` takes a
    bucket's rows and its users' histories (user_id, items, history_key), and returns the rows that may be chosen.
    """
    source = workspace.tables[table]
    chosen = source.read_files([], list(columns))
    history: dict[str, list[int]] = {}
    keys: dict[str, str] = {}
    by_bucket = {file.partition["bucket"]: file for file in files}
    for bucket, file in sorted(by_bucket.items(), key=lambda pair: int(pair[0])):
        owners = workspace.tables["histories"].read(histories, ["user_id", "items", "history_key"], bucket=bucket)
        rows = keep(source.read_files([file], list(columns)), owners)
        order = np.argsort(stable_hash(rows["user_id"].combine_chunks()), kind="stable")[: count - chosen.num_rows]
        rows = rows.take(pa.array(order))
        mine = owners.filter(pc.is_in(owners["user_id"], value_set=rows["user_id"].combine_chunks()))
        users = mine["user_id"].to_pylist()
        history.update(zip(users, mine["items"].to_pylist(), strict=True))
        keys.update(zip(users, mine["history_key"].to_pylist(), strict=True))
        chosen = pa.concat_tables([chosen, rows])
        if chosen.num_rows >= count:
            break
    return chosen, history, keys


def _card(user: str, summary: str, titles: list[str], window: list[dict[str, list[str]]]) -> str:
    counts = value_counts(map(item_values, window))
    recent = "".join(f"<li>{html.escape(title)}</li>" for title in titles[-_SHOWN_ITEMS:])
    top = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN_VALUES]
    bars = "".join(
        f'<div class="bar"><span>{html.escape(value)}</span>'
        f'<i style="width:{100 * number / len(window):.0f}%"></i><span>{number}</span></div>'
        for value, number in top
    )
    return (
        f"<article><h2>User {html.escape(user[:80])} <small>{len(titles):,} events</small></h2>"
        f"<blockquote>{html.escape(summary)}</blockquote>"
        f'<div class="columns"><div><small>Last {min(len(titles), _SHOWN_ITEMS)} items</small><ol>{recent}</ol></div>'
        f"<div><small>Most frequent in the {len(window)} events summarised</small>{bars}</div></div></article>"
    )
