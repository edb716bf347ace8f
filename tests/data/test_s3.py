"""Logs and catalogues on an object store, against moto's server."""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from raypipe.data.catalogue import CatalogueConfig, read_catalogue
from raypipe.data.files import find_files
from raypipe.data.log import LogColumns, LogConfig, open_log
from raypipe.errors import UsageError
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace

TIME = LogColumns(time="t")
HEADER = "user_id,item_id,t\n"
LINES = [f"u{n % 5},i{n},{1_500_000_000 + n}\n" for n in range(300)]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port), "-H", "127.0.0.1"], stdout=out, stderr=out
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def bucket(endpoint, monkeypatch):
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    bucket = boto3.resource("s3", endpoint_url=endpoint, region_name="us-east-1").Bucket(f"logs-{os.getpid()}")
    bucket.create()
    return bucket


def test_csv_on_s3_reads_as_it_does_here(bucket, read_log, write_text):
    text = HEADER + "".join(LINES)
    bucket.put_object(Key="one/log.csv", Body=text.encode())
    here = read_log(write_text("log.csv", text), TIME)
    there = read_log(f"s3://{bucket.name}/one/log.csv", TIME, split_bytes=500)
    assert there.events == here.events
    assert there.splits > 10
    etag = bucket.Object("one/log.csv").e_tag.strip('"')
    assert open_log(LogConfig(path=f"s3://{bucket.name}/one/log.csv", columns=TIME)).checksum == f"{etag}-{len(text)}"


def test_a_prefix_and_a_glob_on_s3_name_parts(bucket, read_log):
    bucket.put_object(Key="many/part-0.csv", Body=(HEADER + "".join(LINES[:100])).encode())
    bucket.put_object(Key="many/part-1.csv.gz", Body=gzip.compress((HEADER + "".join(LINES[100:])).encode()))
    bucket.put_object(Key="many/_SUCCESS", Body=b"")
    times = [1000 * (1_500_000_000 + n) for n in range(300)]
    assert [e["time"] for e in read_log(f"s3://{bucket.name}/many", TIME).events] == times
    assert [e["time"] for e in read_log(f"s3://{bucket.name}/many/part-*.gz", TIME).events] == times[100:]


@pytest.mark.parametrize(
    "pattern",
    ["*.csv", "many/*.csv", "many/part-*", "*/part-?.csv", "many/**/part-*", "**/*.csv", "many/*/*.csv", "**"],
)
def test_a_glob_takes_the_same_files_on_s3_as_here(bucket, tmp_path, pattern):
    for name in ("many/part-0.csv", "many/part-1.csv", "many/old/part-2.csv", "many/old/er/part-3.csv", "top.csv"):
        bucket.put_object(Key=f"globbed/{name}", Body=b"x")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    there = [file.name for file in find_files(f"s3://{bucket.name}/globbed/{pattern}")]
    assert there == [file.name for file in find_files(str(tmp_path / pattern))]
    assert ("old/part-2.csv" in there) == (pattern in {"many/**/part-*", "many/*/*.csv"})


def test_parquet_and_delta_on_s3_are_read(bucket, read_log, tmp_path):
    table = pa.table({"user_id": [f"u{n}" for n in range(50)], "item_id": [1] * 50, "t": list(range(50))})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=7)
    bucket.upload_file(str(tmp_path / "log.parquet"), "log.parquet")
    write_deltalake(f"s3://{bucket.name}/delta", table)
    for name in ("log.parquet", "delta"):
        log = read_log(f"s3://{bucket.name}/{name}", TIME, split_bytes=1)
        assert [(e["user_id"], e["time"]) for e in log.events] == [(f"u{n}", 1000 * n) for n in range(50)]


def test_a_catalogue_on_s3_is_read(bucket):
    bucket.put_object(Key="items.csv", Body=b"item_id,title\n1,One\n")
    items, _ = read_catalogue(CatalogueConfig(path=f"s3://{bucket.name}/items.csv"))
    assert items["title"].to_pylist() == ["One"]


def test_what_is_not_on_s3_is_told(bucket):
    for uri in (f"s3://{bucket.name}/none.csv", "s3://no-such-bucket/log.csv"):
        with pytest.raises(UsageError, match=r"There is no|cannot be read"):
            open_log(LogConfig(path=uri, columns=TIME))


@pytest.mark.parametrize("allowed", [None, "false"])
def test_plain_http_is_refused_alike_of_workspaces_tables_logs_and_delta(bucket, monkeypatch, allowed):
    bucket.put_object(Key="log.csv", Body=(HEADER + LINES[0]).encode())
    rows = pa.table({"user_id": ["u"], "item_id": ["i"], "t": [1]})
    write_deltalake(f"s3://{bucket.name}/open/delta", rows, mode="overwrite")
    uri = f"s3://{bucket.name}"
    asked = [
        lambda: Store(f"{uri}/ws").list("nights"),
        lambda: Store(f"{uri}/ws").check_writable(),
        lambda: Workspace(f"{uri}/ws").tables["histories"].version(),
        lambda: open_log(LogConfig(path=f"{uri}/log.csv", columns=TIME, format="csv")),
        lambda: open_log(LogConfig(path=f"{uri}/open/delta", columns=TIME, format="delta")),
    ]
    for ask in asked:
        ask()
    if allowed is None:
        monkeypatch.delenv("AWS_ALLOW_HTTP")
    else:
        monkeypatch.setenv("AWS_ALLOW_HTTP", allowed)
    told = []
    for ask in asked:
        with pytest.raises(UsageError) as refused:
            ask()
        told.append(str(refused.value))
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    assert set(told) == {
        f"AWS_ENDPOINT_URL is {endpoint}, which is not encrypted. "
        "Set AWS_ALLOW_HTTP=true to allow it, or give an https:// endpoint."
    }
