"""The catalogue over time: item indices are append-only, titles are unique, and content has a hash."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.catalogue import unique_titles
from raypipe.storage.hashing import content_digest
from raypipe.storage.schemas import ITEMS


@dataclass(frozen=True)
class MergedItems:
    """The items table after a catalogue was merged, and the numbers of added, changed and unavailable items."""

    rows: pa.Table
    added: int
    changed: int
    unavailable: int

    def differs_from(self, old: pa.Table) -> bool:
        return not self.rows.equals(old.cast(self.rows.schema))


def merge_items(old: pa.Table, catalogue: pa.Table, *, partial: bool) -> MergedItems:
    """Merge a catalogue (item_id, title, text, attributes, year) into the items table.

    New items get the next indices in catalogue order. An item that is no longer in the catalogue keeps its row and
    becomes unavailable, unless the catalogue is `partial`. If items share a title, the one with the lowest index keeps
    it.
    """
    old = old.sort_by("index")
    known = old["item_id"].combine_chunks()
    place = pc.index_in(known, value_set=catalogue["item_id"].combine_chunks())
    present = pc.is_valid(place)
    is_new = pc.invert(pc.is_in(catalogue["item_id"], value_set=known))
    fresh = catalogue.filter(is_new)

    def column(name: str) -> pa.Array:
        current = catalogue[name].combine_chunks().take(place)
        kept = old[name].combine_chunks().cast(current.type)
        merged = (
            [
                after if there else before
                for there, after, before in zip(present.to_pylist(), current.to_pylist(), kept.to_pylist(), strict=True)
            ]
            if name == "attributes"
            else pc.if_else(present, current, kept).to_pylist()
        )
        return pa.array([*merged, *fresh[name].to_pylist()], ITEMS.columns.field(name).type)

    ids = pa.concat_arrays([known, fresh["item_id"].combine_chunks()])
    years = [*catalogue["year"].combine_chunks().take(place).to_pylist(), *fresh["year"].to_pylist()]
    titles = unique_titles(column("title").to_pylist(), years, ids.to_pylist(), set())
    texts, attributes = column("text"), column("attributes")
    hashes = [
        content_digest(
            title, text, *(part for name, values in sorted(pairs or []) for part in (name, str(len(values)), *values))
        )
        for title, text, pairs in zip(titles, texts.to_pylist(), attributes.to_pylist(), strict=True)
    ]
    available = pc.or_(old["available"].combine_chunks(), present) if partial else present
    rows = pa.table(
        [
            ids,
            pa.array(range(1, len(ids) + 1), pa.int32()),
            pa.array(titles, pa.string()),
            texts,
            attributes,
            pa.array(hashes, pa.string()),
            pa.concat_arrays([available, pa.array([True] * len(fresh), pa.bool_())]),
        ],
        schema=ITEMS.columns,
    )
    before = old["content_hash"].to_pylist()
    changed = sum(now != then for now, then in zip(hashes[: len(before)], before, strict=True))
    return MergedItems(rows, len(fresh), changed, len(ids) - pc.sum(rows["available"]).as_py() if len(ids) else 0)
