"""MovieLens in each of its layouts, made here, and the real 100K."""

from __future__ import annotations

import pytest

from raypipe.data.catalogue import CatalogueConfig, read_catalogue
from raypipe.data.log import LogColumns, LogConfig, open_log
from raypipe.errors import UsageError

FLAGS = {"unknown": 0, "Comedy": 5, "Drama": 8, "Western": 18}


def u_item(item_id: int, title: str, *genres: str) -> bytes:
    flags = ["0"] * 19
    for genre in genres:
        flags[FLAGS[genre]] = "1"
    return "|".join([str(item_id), title, "01-Jan-1995", "", "http://imdb", *flags]).encode("latin-1") + b"\r\n"


def movies(folder) -> tuple[list[dict], list[dict]]:
    catalogue = read_catalogue(CatalogueConfig(path=str(folder)))
    items = catalogue.items.to_pylist()
    return [{**item, "attributes": dict(item["attributes"])} for item in items], catalogue.rejects.to_pylist()


def test_100k_is_read_from_tabs_and_pipes(write_text, read_log, tmp_path):
    write_text("u.data", "196\t1\t3\t881250949\n186\t2\t1\t891717742\n")
    write_text(
        "u.item",
        u_item(1, "Misérables, Les (1995)", "Comedy", "Drama")
        + u_item(2, 'A "Quoted" | piped: title (1971)', "Western")
        + u_item(3, "unknown", "unknown")
        + b"4|broken\r\n",
    )
    log = read_log(tmp_path)
    assert [(e["user_id"], e["item_id"], e["time"], e["weight"]) for e in log.events] == [
        ("196", "1", 881250949000, 1.0),
        ("186", "2", 891717742000, 1.0),
    ]
    items, rejects = movies(tmp_path)
    assert items == [
        {
            "item_id": "1",
            "title": "Misérables, Les (1995)",
            "text": "",
            "attributes": {"genre": ["Comedy", "Drama"]},
            "year": 1995,
        },
        {
            "item_id": "2",
            "title": 'A "Quoted" | piped: title (1971)',
            "text": "",
            "attributes": {"genre": ["Western"]},
            "year": 1971,
        },
        {"item_id": "3", "title": "unknown", "text": "", "attributes": {}, "year": None},
    ]
    assert [(bad["reason"], bad["row"]) for bad in rejects] == [("malformed_row", '{"line": "4|broken"}')]


def test_1m_is_read_from_double_colons(write_text, read_log, tmp_path):
    write_text("ratings.dat", "1::1193::5::978300760\n1::661::3\n2::661::3::978302109\n")
    write_text(
        "movies.dat",
        '1193::Misérables: The "Musical" :: Les (1998)::Drama|Comedy\n661::James (1996)::Drama\n'.encode("latin-1"),
    )
    log = read_log(tmp_path, min_rating=4)
    assert [(e["user_id"], e["item_id"], e["time"]) for e in log.events] == [("1", "1193", 978300760000)]
    assert (log.rows_in, log.filtered, log.reasons()) == (3, 1, {"malformed_row": 1})
    items, _ = movies(tmp_path)
    assert [(i["title"], i["attributes"], i["year"]) for i in items] == [
        ('Misérables: The "Musical" :: Les (1998)', {"genre": ["Drama", "Comedy"]}, 1998),
        ("James (1996)", {"genre": ["Drama"]}, 1996),
    ]


def test_the_csv_layout_is_read_with_quoted_commas(write_text, read_log, tmp_path):
    write_text("ratings.csv", "userId,movieId,rating,timestamp\r\n1,7,4.5,964982703\r\n")
    write_text(
        "movies.csv",
        'movieId,title,genres\n7,"American President, The (1995)",Comedy|Drama\n'
        '8,"Say ""Yes"": or not",(no genres listed)\n9,"unclosed,Drama\n10,Next (2001),Drama\n',
    )
    write_text("tags.csv", "userId,movieId,tag,timestamp\n1,7,funny,964982703\n")
    log = read_log(tmp_path)
    assert [(e["user_id"], e["item_id"], e["time"]) for e in log.events] == [("1", "7", 964982703000)]
    items, rejects = movies(tmp_path)
    assert [(i["item_id"], i["title"], i["attributes"], i["year"]) for i in items] == [
        ("7", "American President, The (1995)", {"genre": ["Comedy", "Drama"]}, 1995),
        ("8", 'Say "Yes": or not', {}, None),
        ("10", "Next (2001)", {"genre": ["Drama"]}, 2001),
    ]
    assert [bad["reason"] for bad in rejects] == ["malformed_row"]


def test_a_movielens_file_is_recognised_without_its_folder(write_text, read_log):
    path = write_text("u.data", "196\t1\t3\t881250949\n")
    assert len(read_log(path).events) == 1


def test_columns_of_its_own_contradict_movielens(write_text, tmp_path):
    write_text("u.data", "196\t1\t3\t881250949\n")
    with pytest.raises(UsageError, match=r"is MovieLens.*Leave log\.columns"):
        open_log(LogConfig(path=str(tmp_path), columns=LogColumns(time="timestamp")))


def test_the_real_100k_has_its_published_counts(shared_data, read_log):
    log = read_log(shared_data / "ml-100k")
    assert (len(log.events), log.rejects) == (100_000, [])
    assert len({e["user_id"] for e in log.events}) == 943
    assert log.events[0] == {"user_id": "196", "item_id": "242", "time": 881250949000, "seq": 0, "weight": 1.0}
    items, rejects = movies(shared_data / "ml-100k")
    assert (len(items), rejects) == (1682, [])
    assert {e["item_id"] for e in log.events} == {i["item_id"] for i in items}
    assert items[0]["attributes"] == {"genre": ["Animation", "Children's", "Comedy"]}
    assert sum(i["year"] is None for i in items) <= 3
