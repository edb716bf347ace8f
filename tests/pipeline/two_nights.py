"""A workspace of two nights with every table filled, a canary, a judgement, rejects, and what interrupted jobs leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from raypipe.cli.main import main
from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.hashing import stable_hash
from raypipe.storage.releases import Release, Releases
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.pipeline.small_logs import DAY, SMALL_ITEMS, SMALL_LOG, START, write_catalogue, write_log
from tests.untrained import store_untrained

USER = "Mnemosyne <zeugma>"
"""One user, whose id no other text has by chance."""
HERS = [(USER, f"i{n % SMALL_ITEMS + 1}", START + n * DAY) for n in range(17)]
USERS = 26
_BAD = [(USER, "no-such-item", START), (USER, "i1", "yesterday"), ("u3", "no-such-item", START)]
_BUCKETS = 4


def run_two_nights(folder: Path) -> None:
    """Below `folder`: the workspace, and the logs it was made of."""
    uri = folder / "workspace"
    where = ("--workspace", str(uri), "--cluster.workers", "1")
    catalogue = write_catalogue(folder / "items.csv", SMALL_ITEMS)
    monday = write_log(folder / "monday.csv", [*SMALL_LOG, *HERS[:10], *_BAD])
    tuesday = write_log(folder / "tuesday.csv", [*HERS[10:], ("u7", "i1", START + 99 * DAY)])
    night = (
        "nightly",
        *where,
        "--summarize.engine.engine",
        "echo",
        "--cards",
        "40",
        "--ingest.log.columns.time",
        "time",
    )
    night += ("--ingest.catalogue.path", str(catalogue), "--ingest.log.path")
    ingest = ("ingest", *where, "--tracking", "off", "--log.columns.time", "time", "--catalogue.path", str(catalogue))
    assert main([*ingest, "--log.path", str(monday)]) == 0
    model = store_untrained(str(uri), RecommenderConfig(model="sasrec", width=8, max_length=5))
    releases = Releases(Store(str(uri)))
    releases.point("champion", releases.add(Release(f"{model.name}/{model.hash}", "echo")))
    assert main([*night, str(monday), "--date", "2026-01-05"]) == 0
    _explain(Workspace(str(uri)))
    assert main([*night, str(tuesday), "--date", "2026-01-06"]) == 0
    (folder / "canary.txt").write_text(f"{USER}\nu7\n")
    canary = ("--users", str(folder / "canary.txt"), "--engine.engine", "echo")
    assert main(["summarize", *where, "--tracking", "off", *canary]) == 0
    assert main(["judge", *where, "--tracking", "off"]) == 0
    assert main(["online", *where, "--tracking", "off"]) == 0
    Store(str(uri)).put("staging/retry/left.jsonl", json.dumps({"user_id": USER}).encode())


def _explain(workspace: Workspace) -> None:
    """Two explanations, by hand: an adapter takes minutes to train."""
    table = workspace.tables["explanations"]
    for number, user in enumerate((USER, "u7"), start=1):
        rows = pa.table([[user], [1], ["yes"], [f"{user} likes it"], ["0" * 32]], schema=table.spec.columns)
        bucket = int(stable_hash(pa.array([user]))[0] % np.uint64(_BUCKETS))
        staged = table.stage(rows, f"by-hand-{number}", {"variant": "explain-x", "bucket": bucket})
        table.publish([staged], mode="append", app="by-hand", number=number)
