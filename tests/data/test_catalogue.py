"""Catalogues of every format: attributes and text derived or named, rejects counted, titles made unique."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from raypipe.data.catalogue import (
    ITEM_COLUMNS,
    AttributeColumn,
    CatalogueColumns,
    CatalogueConfig,
    read_catalogue,
    unique_titles,
)
from raypipe.errors import UsageError

PLOT = "A long story, in which a great many things happen to a great many people."


def read(path, columns: CatalogueColumns | None = None, **config):
    catalogue = read_catalogue(CatalogueConfig(path=str(path), columns=columns or CatalogueColumns(), **config))
    assert catalogue.items.schema == ITEM_COLUMNS
    items = [{**item, "attributes": dict(item["attributes"])} for item in catalogue.items.to_pylist()]
    return items, catalogue.rejects.to_pylist()


def test_short_columns_become_attributes_and_long_ones_text(write_text):
    path = write_text(
        "items.csv",
        f'item_id,title,genres,maker,plot,empty\n1, Toys ,Comedy| Drama|,Acme,"{PLOT}",\n2,"Cars, too",,"A, B",,\n',
    )
    assert read(path) == (
        [
            {
                "item_id": "1",
                "title": "Toys",
                "text": PLOT,
                "attributes": {"genres": ["Comedy", "Drama"], "maker": ["Acme"]},
                "year": None,
            },
            {"item_id": "2", "title": "Cars, too", "text": "", "attributes": {"maker": ["A, B"]}, "year": None},
        ],
        [],
    )


def test_named_columns_are_taken_as_named(write_text):
    path = write_text(
        "items.tsv", f"id\tname\tkinds\tplot\tnotes\tyear\n1\tToys\ta;b\t{PLOT}\tshort\t1995\n2\tCars\t\t\t\tsoon\n"
    )
    columns = CatalogueColumns(
        item="id",
        title="name",
        text=("notes", "plot"),
        attributes={"kind": AttributeColumn(column="kinds", separator=";")},
        year="year",
    )
    items, _ = read(path, columns)
    assert items == [
        {"item_id": "1", "title": "Toys", "text": f"short\n{PLOT}", "attributes": {"kind": ["a", "b"]}, "year": 1995},
        {"item_id": "2", "title": "Cars", "text": "", "attributes": {}, "year": None},
    ]


def test_every_format_gives_the_same_items(tmp_path, write_text):
    rows = [
        {"item_id": "1", "title": "Toys", "genres": ["Comedy", "Drama"], "plot": PLOT},
        {"item_id": "2", "title": "Cars", "genres": [], "plot": None},
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "items.parquet")
    write_deltalake(str(tmp_path / "delta"), table)
    write_text("items.jsonl", "\n".join(json.dumps(row) for row in rows))
    write_text(
        "items.csv.gz", gzip.compress(f'item_id,title,genres,plot\n1,Toys,Comedy|Drama,"{PLOT}"\n2,Cars,,\n'.encode())
    )
    expected, _ = read(tmp_path / "items.parquet")
    assert expected[0]["attributes"] == {"genres": ["Comedy", "Drama"]}
    for name in ("delta", "items.jsonl", "items.csv.gz"):
        assert read(tmp_path / name) == (expected, []), name


def test_decimal_ids_keep_every_digit(tmp_path):
    ids = pa.array([Decimal(1234567890123456789), Decimal(1234567890123456790)], pa.decimal128(38, 0))
    year = pa.array([Decimal(1995), None], pa.decimal128(38, 0))
    (tmp_path / "parts").mkdir()
    pq.write_table(pa.table({"item_id": ids, "title": ["A", "B"], "year": year}), tmp_path / "parts" / "a.parquet")
    pq.write_table(pa.table({"item_id": [7], "title": ["C"], "year": [2001]}), tmp_path / "parts" / "b.parquet")
    items, rejects = read(tmp_path / "parts", CatalogueColumns(year="year"))
    assert [(item["item_id"], item["year"]) for item in items] == [
        ("1234567890123456789", 1995),
        ("1234567890123456790", None),
        ("7", 2001),
    ]
    assert rejects == []


def test_columns_that_are_no_words_are_passed_over(tmp_path):
    columns = {
        "images": pa.array([[{"url": "x"}], []]),
        "nested": pa.array([[["a"]], []], pa.list_(pa.list_(pa.string()))),
        "maker": pa.array([{"name": "x"}, None]),
        "extra": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "kinds": pa.array([["a", "b"], []]),
    }
    pq.write_table(pa.table({"item_id": ["1", "2"], "title": ["One", "Two"], **columns}), tmp_path / "items.parquet")
    items, rejects = read(tmp_path / "items.parquet")
    assert [item["attributes"] for item in items] == [{"kinds": ["a", "b"]}, {}]
    assert rejects == []


def test_of_columns_of_one_name_the_first_is_read(tmp_path, write_text):
    arrays = [pa.array([value]) for value in ("1", "One", "x", "y")]
    pq.write_table(pa.Table.from_arrays(arrays, names=["item_id", "title", "g", "g"]), tmp_path / "items.parquet")
    write_text("items.csv", "item_id,title,g,g\n1,One,x,y\n")
    for name in ("items.parquet", "items.csv"):
        (item,), _ = read(tmp_path / name)
        assert (item["title"], item["attributes"]) == ("One", {"g": ["x"]})


def test_each_reject_has_its_reason_and_the_first_good_row_stays(write_text):
    long = "x" * 1025
    lines = ["1,", "1,First", "1,Second", ",No id", f"{long},Long", "2,a,b", "3,\xe9", "4,Good"]
    path = write_text("items.csv", b"item_id,title\n" + "\n".join(lines).encode("latin-1"))
    items, rejects = read(path)
    assert [(item["item_id"], item["title"]) for item in items] == [("1", "First"), ("4", "Good")]
    assert sorted(bad["reason"] for bad in rejects) == [
        "bad_text",
        "duplicate_item",
        "id_too_long",
        "malformed_row",
        "missing_title",
        "null_item",
    ]
    duplicate = next(bad for bad in rejects if bad["reason"] == "duplicate_item")
    assert (duplicate["key"], json.loads(duplicate["row"])) == ("items.csv:25", {"item_id": "1", "title": "Second"})


def test_broken_json_items_cost_only_themselves(write_text):
    lines = [
        '{"item_id": 1, "title": "One"}',
        '{"item_id": 2',
        '{"item_id": "3", "title": "\\ud800"}',
        '{"item_id": 4}',
        '{"item_id": "5", "title": "Five", "price": ' + "1" * 5000 + "}",
    ]
    items, rejects = read(write_text("items.jsonl", "\n".join(lines)))
    assert [item["item_id"] for item in items] == ["1", "5"]
    assert sorted(bad["reason"] for bad in rejects) == ["bad_text", "malformed_row", "missing_title"]


def test_text_may_hold_line_breaks_and_a_stray_quote_costs_one_line(write_text):
    items, rejects = read(write_text("a.csv", 'item_id,title,plot\n1,One,"two\nlines"\n2,Two,plain\n'))
    assert ([item["item_id"] for item in items], rejects) == (["1", "2"], [])
    assert items[0]["attributes"] == {"plot": ["two\nlines"]}
    items, rejects = read(write_text("b.csv", 'item_id,title\n1,One\n2,"Two\n3,Three\n4,Four\n'))
    assert [item["item_id"] for item in items] == ["1", "3", "4"]
    assert [bad["reason"] for bad in rejects] == ["malformed_row"]


def test_python_lists_in_text_are_flattened(write_text):
    listed = f'"[\'First part.\', \'\', ""It\'s the second, with a bracket ].""]","[not a list, {PLOT}]"'
    columns = CatalogueColumns(text=("a", "b"), attributes={})
    items, _ = read(write_text("items.csv", f"item_id,title,a,b\n1,One,{listed}\n"), columns)
    assert items[0]["text"] == f"First part. It's the second, with a bracket ].\n[not a list, {PLOT}]"


def test_a_catalogue_without_titles_is_told(write_text, tmp_path):
    with pytest.raises(UsageError, match=r"no column title; it has: item_id, titel\. The closest is titel"):
        read(write_text("a.csv", "item_id,titel\n1,One\n"))
    with pytest.raises(UsageError, match="has no title: column title is empty"):
        read(write_text("b.csv", "item_id,title\n1,\n2, \n"))
    with pytest.raises(UsageError, match="has no rows"):
        read(write_text("c.csv", "item_id,title\n"))
    with pytest.raises(UsageError, match="There is nothing at"):
        read(tmp_path / "none.csv")


def test_titles_become_unique_and_the_first_holder_keeps_its_own():
    titles = ["Heat", "Heat", "Heat (1995)", "Heat", "Heat", "Up (2009)", "Up (2009)", "Taken"]
    years = [1986, 1995, 1995, None, 1995, 2009, 2009, None]
    ids = ["a", "b", "c", "d", "e", "f", "g", "h"]
    assert unique_titles(titles, years, ids, {"Taken", "Taken [h]"}) == [
        "Heat",
        "Heat (1995)",
        "Heat (1995) [c]",
        "Heat [d]",
        "Heat [e]",
        "Up (2009)",
        "Up (2009) [g]",
        "Taken [h] 2",
    ]


def test_the_real_catalogues_are_read_whole(shared_data):
    films, rejects = read(shared_data / "ml-1m" / "items.csv.gz")
    assert (len(films), rejects) == (3883, [])
    assert films[0]["attributes"] == {"genres": ["Animation Children's Comedy"], "director": ["John Lasseter"]}
    assert films[0]["text"].startswith("Tom Hanks, Tim Allen")
    tools, rejects = read(shared_data / "amazon-industrial" / "items.csv.gz")
    assert (len(tools), rejects) == (3686, [])
    assert tools[0]["attributes"] == {"brand": ["Sealed Unit Parts Co., Inc."]}
    assert tools[0]["text"].startswith("Relay/CAPACITOR hard start kit")
    assert sum(tool["text"].startswith("['") for tool in tools) == 0
