"""The catalogue: items with title, text and attributes. The driver reads it whole.

A million items with a few hundred bytes of text take seconds and about 2 GB. A catalogue that does not fit into the
driver's memory is not supported.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.config import Config, free, shaping
from raypipe.data.attributes import ATTRIBUTES, attribute_maps, is_short, joined_text, value_lists
from raypipe.data.casting import to_ids, to_numbers
from raypipe.data.catalogue_files import ItemRows, read_item_rows
from raypipe.data.files import resolve
from raypipe.data.formats import Format, detect_format
from raypipe.data.rejects import MAX_ID_BYTES, Reject, reject_table, row_json
from raypipe.errors import UsageError

ITEM_COLUMNS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("attributes", ATTRIBUTES, nullable=False),
        pa.field("year", pa.int32()),
    ]
)


class AttributeColumn(Config):
    """The column of an attribute, and the separator between several values in it."""

    column: str = shaping(description="the column's name")
    separator: str | None = shaping(None, "unset: one value a row", min_length=1)


class CatalogueColumns(Config):
    """Which columns of the catalogue hold what. For MovieLens they are known.

    If `attributes` is not set, all other columns of short text (a median of at most 40 characters) are attributes,
    split at "|". If `text` is not set, it is the columns of longer text. Columns that are neither are not read.
    """

    item: str = shaping("item_id", "the item's id")
    title: str = shaping("title", "the item's title")
    text: tuple[str, ...] | None = shaping(None, "columns that describe the item in words")
    attributes: dict[str, AttributeColumn] | None = shaping(None, "attribute → where it stands")
    year: str | None = shaping(None, "the year it came out")


class CatalogueConfig(Config):
    """A catalogue of items and what its columns mean."""

    path: str = free(description="file, folder or glob of parts, or s3:// URI")
    format: Format = shaping("auto", "auto: told from names and first bytes")
    columns: CatalogueColumns = shaping(CatalogueColumns)
    delimiter: str | None = shaping(None, "of CSV; unset: a comma, or a tab in .tsv files", min_length=1, max_length=1)


class ParsedCatalogue(NamedTuple):
    """`items` with ITEM_COLUMNS, one row an item, and `rejects`, the unusable rows.

    Together they are all rows of the source.
    """

    items: pa.Table
    rejects: pa.Table


def read_catalogue(config: CatalogueConfig) -> ParsedCatalogue:
    """Read the items (with titles as in the source, not yet unique) and the rejects.

    Reasons of rejects: null_item, missing_title, duplicate_item (the first good row stays), id_too_long, malformed_row,
    bad_text. Raises UsageError if a column is missing, if there is no row, or if no row has a title.
    """
    path = resolve(config.path)
    format_ = detect_format(path, "items") if config.format == "auto" else config.format
    if format_ == "movielens" and config.columns != CatalogueColumns():
        raise UsageError(
            f"{path} is MovieLens, whose columns are known.",
            "Leave catalogue.columns out, or set catalogue.format: csv and name the file.",
        )
    rows = read_item_rows(path, format_, config.delimiter)
    if rows.table.num_rows + rows.rejects.num_rows == 0:
        raise UsageError(f"The catalogue {path} has no rows.", "Check that it is the right file.")
    columns = config.columns
    if format_ == "movielens":
        columns = CatalogueColumns(
            text=(), attributes={"genre": AttributeColumn(column="genre", separator="|")}, year="year"
        )
    _check_columns(rows.table.column_names, columns, path)
    return _cast(rows, columns, path)


def unique_titles(titles: Sequence[str], years: Sequence[int | None], ids: Sequence[str], taken: set[str]) -> list[str]:
    """`titles` made unique among themselves and `taken`, in order. The first holder keeps its title.

    A later holder gets " (year)", if the year is known, is not in the title yet, and the result is free. Otherwise it
    gets " [item_id]", and if even that is taken, " [item_id] 2" and so on. `taken` is not changed.
    """
    seen = set(taken)
    unique = []
    for title, year, item_id in zip(titles, years, ids, strict=True):
        chosen = title
        if chosen in seen and year is not None and str(year) not in title:
            chosen = f"{title} ({year})"
        if chosen in seen:
            chosen = f"{title} [{item_id}]"
        number = 2
        while chosen in seen:
            chosen = f"{title} [{item_id}] {number}"
            number += 1
        seen.add(chosen)
        unique.append(chosen)
    return unique


def _check_columns(found: list[str], columns: CatalogueColumns, path: str) -> None:
    attributes = [attribute.column for attribute in (columns.attributes or {}).values()]
    year = [columns.year] if columns.year else []
    for name in (columns.item, columns.title, *(columns.text or ()), *attributes, *year):
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
            meant = f" The closest is {close[0]}." if close else ""
            raise UsageError(
                f"The catalogue {path} has no column {name}; it has: {', '.join(found[:50])}.{meant}",
                "Set catalogue.columns to the names it uses; item ids and titles are needed.",
            )


def _cast(rows: ItemRows, columns: CatalogueColumns, path: str) -> ParsedCatalogue:
    table = rows.table
    ids = to_ids(table.column(columns.item).combine_chunks())
    titles = pc.utf8_trim_whitespace(_as_string(table.column(columns.title).combine_chunks()))
    untitled = pc.fill_null(pc.equal(titles, ""), True).to_numpy(zero_copy_only=False)
    if untitled.all() and table.num_rows:
        raise UsageError(
            f"The catalogue {path} has no title: column {columns.title} is empty in all of its rows.",
            "Set catalogue.columns.title to the column of the titles.",
        )
    too_long = pc.fill_null(pc.binary_length(ids.values), 0).to_numpy(zero_copy_only=False) > MAX_ID_BYTES
    reasons = np.full(table.num_rows, None, object)
    for wrong, reason in ((untitled, "missing_title"), (too_long, "id_too_long"), (ids.missing, "null_item")):
        reasons[wrong] = reason
    good = np.flatnonzero(reasons == None)  # noqa: E711 - element-wise
    _, first = np.unique(pc.dictionary_encode(ids.values.take(pa.array(good))).indices.to_numpy(), return_index=True)
    reasons[np.delete(good, first)] = "duplicate_item"

    kept = pa.array(np.sort(good[first]))
    items = table.take(kept)
    text, attributes = _texts_and_attributes(items, columns)
    cast = pa.table(
        [ids.values.take(kept), titles.take(kept), text, attributes, _years(items, columns.year)], schema=ITEM_COLUMNS
    )
    return ParsedCatalogue(cast, pa.concat_tables([rows.rejects, _rejects(rows, reasons)]))


_MESSAGES = {
    "missing_title": "the item has no title",
    "id_too_long": f"the item's id is longer than {MAX_ID_BYTES} bytes",
    "null_item": "the item's id is empty",
    "duplicate_item": "an earlier row has this item's id",
}


def _rejects(rows: ItemRows, reasons: np.ndarray) -> pa.Table:
    bad = np.flatnonzero(reasons != None)  # noqa: E711 - element-wise
    values = rows.table.take(pa.array(bad)).to_pylist()
    names = rows.files.take(pa.array(bad)).to_pylist()
    tables = [
        reject_table([Reject(int(rows.positions[row]), reasons[row], _MESSAGES[reasons[row]], row_json(value))], name)
        for row, value, name in zip(bad.tolist(), values, names, strict=True)
    ]
    return pa.concat_tables(tables) if tables else reject_table([], "")


def _texts_and_attributes(items: pa.Table, columns: CatalogueColumns) -> tuple[pa.Array, pa.Array]:
    taken = {columns.item, columns.title, columns.year, *(columns.text or ())}
    texts, named = list(columns.text or ()), dict(columns.attributes or {})
    for name in items.column_names:
        column = items.column(name).combine_chunks()
        if name in taken or not (pa.types.is_string(column.type) or pa.types.is_list(column.type)):
            continue
        short = is_short(column)
        if short and columns.attributes is None:
            named[name] = AttributeColumn(column=name, separator="|")
        if short is False and columns.text is None and name not in {a.column for a in named.values()}:
            texts.append(name)
    lists = {
        name: value_lists(_words(items, attribute.column), attribute.separator) for name, attribute in named.items()
    }
    return joined_text([_words(items, name) for name in texts], items.num_rows), attribute_maps(lists, items.num_rows)


def _words(items: pa.Table, name: str) -> pa.Array:
    column = items.column(name).combine_chunks()
    return column if pa.types.is_list(column.type) else _as_string(column)


def _as_string(column: pa.Array) -> pa.Array:
    return to_ids(column).values


def _years(items: pa.Table, name: str | None) -> pa.Array:
    if name is None:
        return pa.nulls(items.num_rows, pa.int32())
    numbers = to_numbers(items.column(name).combine_chunks())
    years = numbers.as_floats()
    known = ~numbers.missing & (years == np.floor(years)) & (np.abs(years) < 10_000)
    return pa.array(np.where(known, years, 0).astype(np.int32), mask=~known)
