"""The synthetic data set repeats, streams, and holds what it promises to plant."""

from __future__ import annotations

import subprocess
import sys
from datetime import date

import numpy as np
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq
import pytest

from raypipe.data.catalogue import CatalogueColumns, CatalogueConfig, read_catalogue
from raypipe.data.log import LogColumns
from raypipe.data.synthetic import LaterCounts, LaterLog, SyntheticConfig
from raypipe.errors import UsageError

START_MS, END_MS = 1_704_067_200_000, 1_735_689_600_000
SMALL = SyntheticConfig(users=2_000, items=500, events=60_000, later=LaterLog(user_share=0.1))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return SMALL.write(tmp_path_factory.mktemp("synthetic"))


def columns(path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = pq.read_table(path) if path.suffix == ".parquet" else arrow_csv.read_csv(path)
    user, item, time = (table[name].to_numpy() for name in ("user_id", "item_id", "time"))
    return user, item, time


def by_user(path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    user, item, time = columns(path)
    order = np.lexsort((time, user))
    return user[order], item[order], time[order]


def first_genres(dataset) -> np.ndarray:
    """The first genre of each item, by id."""
    table = arrow_csv.read_csv(dataset.items, parse_options=arrow_csv.ParseOptions(newlines_in_values=True))
    return np.array(["", *(genres.split("|")[0] for genres in table["genres"].to_pylist())])


def test_the_same_config_writes_the_same_rows(written, tmp_path):
    again = SMALL.write(tmp_path)
    for name in ("log", "truth", "later_log"):
        assert pq.read_table(getattr(again, name)).equals(pq.read_table(getattr(written, name))), name
    assert again.items.read_bytes() == written.items.read_bytes()
    other = SMALL.model_copy(update={"seed": 1}).write(tmp_path / "other")
    assert not pq.read_table(other.log).equals(pq.read_table(written.log))


def test_csv_and_parquet_hold_the_same_log(written, tmp_path):
    as_csv = SMALL.model_copy(update={"log_format": "csv"}).write(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(columns(as_csv.log), columns(written.log), strict=True))


def test_the_log_has_the_size_and_the_span_asked_for(written):
    user, item, time = columns(written.log)
    assert len(user) == 60_000
    assert np.array_equal(np.unique(user), np.arange(1, 2_001))
    assert item.min() >= 1
    assert item.max() <= 500
    assert time.min() >= START_MS
    assert time.max() < END_MS
    assert 0.005 < np.mean(np.diff(time) < 0) < 0.03  # about one event in a hundred arrives late


def test_lengths_are_skewed_and_items_popular_as_zipf_has_it(written):
    user, item, _ = columns(written.log)
    lengths = np.bincount(user)[1:]
    assert lengths.min() >= 1
    assert np.median(lengths) < 0.8 * lengths.mean()
    popular = np.sort(np.bincount(item, minlength=501)[1:])[::-1]
    assert popular[:50].sum() > 0.35 * len(item)
    assert popular[-250:].sum() < 0.25 * len(item)


def test_tastes_change_at_the_planted_time(written):
    user, item, time = by_user(written.log)
    truth = pq.read_table(written.truth).to_pylist()
    assert [row["events"] for row in truth] == np.bincount(user)[1:].tolist()
    drifting = [row for row in truth if row["drift_time"] is not None]
    assert 0.25 < len(drifting) / len(truth) < 0.35
    genre = first_genres(written)[item]
    shares = {"before": [0, 0, 0], "after": [0, 0, 0]}
    bounds = np.searchsorted(user, np.arange(1, 2_002))
    for row in drifting:
        assert not set(row["genres_before"]) & set(row["genres_after"])
        span = slice(*bounds[row["user_id"] - 1 : row["user_id"] + 1])
        drifted = time[span] >= row["drift_time"]
        old, new = np.isin(genre[span], row["genres_before"]), np.isin(genre[span], row["genres_after"])
        for name, rows in (("before", ~drifted), ("after", drifted)):
            counts = (rows.sum(), (rows & old).sum(), (rows & new).sum())
            shares[name] = [a + b for a, b in zip(shares[name], counts, strict=True)]
    (before, old_before, new_before), (after, old_after, new_after) = shares["before"], shares["after"]
    assert old_before / before > 0.65
    assert new_before / before < 0.25
    assert old_after / after < 0.25
    assert new_after / after > 0.65
    steady = [row for row in truth if row["drift_time"] is None]
    assert all(row["genres_before"] == row["genres_after"] for row in steady)


def test_the_next_part_of_a_series_is_likely_next(written):
    user, item, _ = by_user(written.log)
    series = arrow_csv.read_csv(written.items)["series"].to_pylist()
    has_next = np.array([False, *(bool(a) and a == b for a, b in zip(series, [*series[1:], ""], strict=True))])
    again = user[1:] == user[:-1]
    starts = again & has_next[item[:-1]]
    assert 0.45 < np.mean(item[1:][starts] == item[:-1][starts] + 1) < 0.7
    others = again & ~has_next[item[:-1]]
    assert np.mean(item[1:][others] == item[:-1][others] + 1) < 0.05


def test_users_have_a_brand_they_return_to(written):
    user, item, _ = by_user(written.log)
    brand = np.array(["", *arrow_csv.read_csv(written.items)["brand"].to_pylist()])
    favourite = np.array(["", *pq.read_table(written.truth)["brand"].to_pylist()])
    share = np.mean(brand[item] == favourite[user])
    chance = np.mean(brand[item] == np.random.default_rng(0).permutation(favourite[user]))
    assert share > chance + 0.12


def test_the_items_are_a_catalogue_rich_in_text(written):
    config = CatalogueConfig(path=str(written.items), columns=CatalogueColumns(year="year"))
    items, rejects = read_catalogue(config)
    assert (items.num_rows, rejects.num_rows) == (500, 0)
    assert len(set(items["title"].to_pylist())) == 500
    for item in items.to_pylist():
        attributes = dict(item["attributes"])
        assert set(attributes) <= {"genres", "brand", "series"}
        assert attributes["brand"][0] in item["text"]
        assert attributes["genres"][0].lower() in item["text"]
        assert 2 <= item["text"].count(". ") + 1 <= 4
        assert 1960 <= item["year"] <= 2030


def test_the_log_is_a_log(written, read_log):
    log = read_log(written.log, LogColumns(time="time"))
    assert (len(log.events), log.rejects) == (60_000, [])


def test_the_later_log_goes_on_where_the_first_ended(written):
    first, later = columns(written.log), columns(written.later_log)
    counts = written.later
    user, _, time = later
    assert len(user) == counts.new + counts.late + counts.repeated
    assert 150 < counts.users == len(np.unique(user[time >= END_MS])) < 250
    assert np.sum(time >= END_MS) == counts.new
    assert time.max() < END_MS + 24 * 3_600_000
    known = set(zip(*(column.tolist() for column in first), strict=True))
    repeated = sum(row in known for row in zip(*(column.tolist() for column in later), strict=True))
    assert repeated == counts.repeated == round(0.05 * counts.new)
    assert counts.late == round(0.05 * counts.new)


def test_without_a_later_log_there_is_none(tmp_path):
    dataset = SyntheticConfig(users=10, items=20, events=100).write(tmp_path)
    assert (dataset.later_log, dataset.later) == (None, LaterCounts(0, 0, 0, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.csv", "log.parquet", "truth.parquet"]


def test_impossible_sizes_and_spans_are_told(tmp_path):
    with pytest.raises(UsageError, match="100 events do not suit 101 users"):
        SyntheticConfig(users=101, events=100).write(tmp_path)
    with pytest.raises(UsageError, match="end to a later day"):
        SyntheticConfig(start=date(2024, 1, 1), end=date(2024, 1, 1)).write(tmp_path)


def test_five_million_events_need_no_more_than_600_mb(tmp_path):
    script = (
        "from raypipe.data.synthetic import SyntheticConfig\n"
        f"SyntheticConfig(users=100_000, items=20_000, events=5_000_000).write({str(tmp_path)!r})\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
    )
    peak_kb = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert peak_kb < 600 << 10
    assert pq.read_metadata(tmp_path / "log.parquet").num_rows == 5_000_000
