"""Every table of a night is read by DuckDB and by Polars, at the versions the night's manifest names.

Both open tables by delta-rs, as raypipe does. For readers that do not (Spark, Trino) a table is also read by nothing but Delta's
protocol, from the log's JSON and the Parquet files, and has to ask no more of a reader than the protocol's first version.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe.storage.nights import Nights
from raypipe.storage.schemas import TABLES
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run, unavailable
from tests.pipeline.two_nights import HERS, USER, USERS

PAGE = (Path(__file__).parents[2] / "jobs/WORKSPACE.md").read_text()
(CONNECT,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
QUERIES = [
    query.strip()
    for block in re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    for query in block.split(";")
    if query.strip()
]


@pytest.fixture
def asked(two_nights: str, raypipe: Run) -> Callable[[str], list[tuple[Any, ...]]]:
    """The page's connection to a workspace whose night in force is not of the newest tables."""
    if importlib.util.find_spec("duckdb") is None:
        unavailable("duckdb is not installed")
    forgotten = raypipe("forget", "--workspace", two_nights, "--user", "u9")
    assert forgotten.code == 0, forgotten.stderr
    # After the night: readers of the night do not see it.
    ingested = raypipe(
        "ingest", "--workspace", two_nights, "--log.path", write_more(two_nights), "--log.columns.time", "time"
    )
    assert ingested.code == 0, ingested.stderr
    names: dict[str, Any] = {}
    exec(CONNECT.replace('"work/ws"', repr(two_nights)), names)
    return lambda query: names["connection"].sql(query).fetchall()


def write_more(uri: str) -> Path:
    path = Path(uri).parent / "after-the-night.csv"
    path.write_text("user_id,item_id,time\nlate,i1,1800000000000\n")
    return path


def test_duckdb_reads_the_night_and_not_what_came_after(asked: Callable[[str], list[tuple[Any, ...]]]) -> None:
    assert asked("SELECT len(items) FROM histories WHERE user_id = 'Mnemosyne <zeugma>'") == [(len(HERS),)]
    assert asked("SELECT count(*) FROM histories") == [(USERS - 1,)]
    assert asked("SELECT count(*) FROM histories WHERE user_id = 'late'") == [(0,)]


def test_every_documented_query_answers_and_every_table_is_in_one(
    asked: Callable[[str], list[tuple[Any, ...]]],
) -> None:
    for query in QUERIES:
        assert asked(query), query
    words = {word for query in QUERIES for word in re.findall(r"(?:FROM|JOIN) (\w+)", query)}
    assert set(TABLES) <= words


def by_protocol(folder: Path, version: int) -> pa.Table:
    """A version of a table as the protocol's section on log replay says, for a log without checkpoints."""
    files: dict[str, dict[str, str]] = {}
    for number in range(version + 1):
        for line in (folder / f"_delta_log/{number:020d}.json").read_text().splitlines():
            ((action, values),) = json.loads(line).items()
            if action == "protocol":
                assert (values["minReaderVersion"], values.get("readerFeatures")) == (1, None)
            elif action == "metaData":
                names = [field["name"] for field in json.loads(values["schemaString"])["fields"]]
                # Mapped names and the like would be in here.
                assert not any("columnMapping" in option for option in values["configuration"])
            elif action == "add":
                assert "deletionVector" not in values
                files[values["path"]] = values["partitionValues"]
            elif action == "remove":
                files.pop(values["path"])
    parts = []
    for path, partition in files.items():
        rows = pq.read_table(folder / unquote(path), partitioning=None)
        for name, value in partition.items():
            rows = rows.append_column(name, pa.repeat(pa.scalar(value), rows.num_rows))
        parts.append(rows.select(names))
    return pa.concat_tables(parts)


def test_nothing_but_deltas_protocol_is_needed_to_read_a_night(two_nights: str) -> None:
    workspace, night = Workspace(two_nights), Nights(Store(two_nights)).current()
    assert night is not None
    for name, version in night.tables.items():
        theirs = by_protocol(Path(two_nights) / "tables" / name, version)
        ours = workspace.tables[name].read(version)
        assert theirs.column_names == ours.column_names, name
        assert sorted(map(str, theirs.cast(ours.schema).to_pylist())) == sorted(map(str, ours.to_pylist())), name


def test_polars_reads_what_raypipe_reads(two_nights: str, two_nights_once: Path) -> None:
    workspace = Workspace(two_nights)
    night = Nights(Store(two_nights)).current()
    assert night is not None
    assert json.loads((Path(two_nights) / "nights/current.json").read_text()) == {"date": night.date}
    assert set(night.tables) == set(TABLES) - {"tombstones"}
    for name, version in night.tables.items():
        table = workspace.tables[name]
        theirs = pl.scan_delta(table.uri, version=version).collect()
        ours = pl.from_arrow(table.read(version))
        assert isinstance(ours, pl.DataFrame)
        assert theirs.height == ours.height > 0
        rows = [sorted(map(str, frame.select(ours.columns).rows())) for frame in (theirs, ours)]
        assert rows[0] == rows[1], name
    summaries = pl.scan_delta(workspace.tables["summaries"].uri, version=night.tables["summaries"])
    hers = summaries.filter(pl.col("user_id") == USER).collect()
    assert hers["covered"].to_list() == [len(HERS) // 5]
