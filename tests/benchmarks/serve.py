"""`raypipe serve` beside the same recommender in bare FastAPI and uvicorn, at rising load, alternating in one run.

Both recommend ten of the catalogue's items after a history of 20, by the same untrained SASRec in one process of one torch
thread. The bare one is what one would write at once: one request, one forward pass, no token, no filter but what was seen, no
limits. Requests are sent when they are due, whatever became of those before (an open loop); one rate lasts `--seconds`. A rate
is carried where 99 % of its requests are answered with 200 and 99 % of these within `LATE_S`.

Figures: `requests_per_s` (the highest rate ours carries) and `rate_vs_bare`; `p99_vs_bare`, at 70 % of that rate, the median of
the rounds' ratios, and `p99_ms`. Past saturation, at `PAST` times that rate, `answered_past`, the least rate that is still answered,
`shed`, the largest share that got 429 or 503, and `refused_p99_ms`, until that was told; `errors`, whatever got neither an
answer nor 429 or 503, over the whole run; `client_p99_ms`, what the client alone takes at the highest of these rates, of a
server that answers at once.

Then 70 % is held for `--hold` seconds: `memory_growth_mib` of the replica and HAProxy from its second tenth to its last, which
for ten minutes is from minute 2 to minute 10, and `whole_growth_mib`, Ray's own processes among them. `--steady RATE` takes
that for the 70 %, and searches and compares nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np

from raypipe.cli.main import main as raypipe
from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.models import Models
from raypipe.storage.nights import Night, Nights
from raypipe.storage.releases import Release, Releases
from raypipe.storage.workspace import Workspace
from tests.benchmarks.open_loop import AtOnce, Sent, send
from tests.benchmarks.resident import Resident
from tests.serving.running import Running, free_ports, start, stop
from tests.untrained import store_untrained

HISTORY, COUNT, LATE_S = 20, 10, 0.5
PAST = (1.25, 1.5, 2.0, 3.0)
MODEL = RecommenderConfig(model="sasrec", width=64, hidden=128, max_length=50, dropout=0)

BARE = """
import sys
from pathlib import Path
import torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.sequences import Sequences
torch.set_num_threads(1)
model, _ = load_recommender(Path(sys.argv[1]))
table = model.item_states().detach()
app = FastAPI()
class Query(BaseModel):
    history: list[str]
    count: int = 10
@app.post("/v1/recommend")
async def recommend(query: Query):
    items = [int(item) for item in query.history]
    with torch.no_grad():
        scores = (model.encode(Sequences.of([items])) @ table.T)[0]
        scores[[0, *items]] = -torch.inf
        best = scores.topk(query.count)
    pairs = zip(best.indices.tolist(), best.values.tolist())
    return {"items": [{"item_id": str(item), "title": "", "score": score} for item, score in pairs]}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each rate")
    parser.add_argument("--first", type=float, default=50.0, help="requests a second to begin with")
    parser.add_argument("--growth", type=float, default=1.25, help="from one rate to the next")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison at 70 %%")
    parser.add_argument("--past", type=float, default=20.0, help="seconds of each rate past saturation; 0 for none")
    parser.add_argument(
        "--hold", type=float, default=600.0, help="seconds at 70 %% while memory is watched; 0 for none"
    )
    parser.add_argument("--steady", type=float, help="the 70 %%, in requests a second, if it is known")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = made_workspace(folder, given.items, given.users)
        running = start(uri, folder, "--language.replicas", "0")
        bare = Bare(uri)
        try:
            print(json.dumps({"bench": "serve", "figures": measured(given, running, bare), "machine": machine()}))
        finally:
            bare.process.kill()
            stop(running)


def measured(given: argparse.Namespace, running: Running, bare: Bare) -> dict[str, float]:
    rng = np.random.default_rng(0)
    histories = [[str(item) for item in rng.integers(1, given.items + 1, HISTORY)] for _ in range(500)]
    bodies = [{"history": history, "count": COUNT} for history in histories]
    everything: list[Sent] = []

    def ours(rate: float, seconds: float = given.seconds) -> Sent:
        sent = send(f"{running.url}/recommend", running.secret, bodies, rate, seconds)
        everything.append(sent)
        return told("ours", rate, sent)

    def other(rate: float, seconds: float = given.seconds) -> Sent:
        return told("bare", rate, send(bare.url, "", bodies, rate, seconds))

    ours(given.first, 2.0)  # what comes first is slow everywhere
    other(given.first, 2.0)
    figures, rate = {}, given.steady
    if rate is None:
        carried = saturation(given, {"ours": ours, "bare": other})
        rate = 0.7 * carried["ours"]
        rounds = [(ours(rate), other(rate)) for _ in range(given.rounds)]
        figures = {
            "requests_per_s": round(carried["ours"], 1),
            "bare_requests_per_s": round(carried["bare"], 1),
            "rate_vs_bare": round(carried["ours"] / carried["bare"], 3),
            "p99_ms": round(1000 * statistics.median(mine.p99_s for mine, _ in rounds), 2),
            "p99_vs_bare": round(statistics.median(mine.p99_s / its.p99_s for mine, its in rounds), 3),
        }
    if given.past:
        most = max(PAST) * rate / 0.7
        with AtOnce() as url:
            alone = told("client", most, send(url, "", bodies, most, given.seconds))
        past = [ours(factor * rate / 0.7, given.past) for factor in PAST]
        figures |= {
            "client_p99_ms": round(1000 * alone.p99_s, 2),
            "answered_past": round(min(sent.statuses[200] for sent in past) / given.past, 1),
            "shed": round(max(sent.share(429, 503) for sent in past), 4),
            "refused_p99_ms": round(1000 * max(sent.refused_p99_s for sent in past), 1),
        }
    if given.hold:
        with Resident(running.process.pid) as resident:
            ours(rate, given.hold)
        print(resident.told(), file=sys.stderr)
        figures |= {
            "memory_growth_mib": resident.growth_mib("replica", "haproxy"),
            "whole_growth_mib": resident.growth_mib(),
        }
    return figures | {"errors": sum(sent.errors for sent in everything)}


def saturation(given: argparse.Namespace, kinds: dict[str, Callable[[float], Sent]]) -> dict[str, float]:
    """The highest rate each carries, the rates of both rising in turn; one that is not carried is tried a second time, for the
    machine may have been at something else."""
    carried = dict.fromkeys(kinds, 0.0)
    rate, rising = given.first, set(kinds)
    while rising:
        for name in sorted(rising):
            if kinds[name](rate).is_carried(LATE_S) or kinds[name](rate).is_carried(LATE_S):
                carried[name] = rate
            else:
                rising.discard(name)
        rate *= given.growth
    if not all(carried.values()):
        sys.exit(f"Not even {given.first:g} requests a second are carried: {carried}. Begin with less: --first.")
    return carried


def told(name: str, rate: float, sent: Sent) -> Sent:
    print(
        f"{name}: {rate:.0f}/s, {sent.share(200):.1%} answered, p50 {1000 * sent.quantile_s(0.5):.1f} ms, "
        f"p99 {1000 * sent.p99_s:.1f} ms, begun {1000 * sent.late_p99_s:.1f} ms late, "
        f"refused after {1000 * sent.refused_p99_s:.1f} ms, {dict(sent.statuses)} {dict(sent.reasons) or ''}",
        file=sys.stderr,
    )
    return sent


class Bare:
    """The other service."""

    def __init__(self, uri: str) -> None:
        store = Workspace(uri).store
        champion = Releases(store).named("champion")
        assert champion is not None
        checkpoint = store.local_path(f"models/{champion.recommender}/checkpoint")
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}/v1/recommend"
        self.process = subprocess.Popen([sys.executable, "-c", BARE, str(checkpoint), str(port)])
        while True:
            assert self.process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=5).read()
                return
            except urllib.error.URLError:
                time.sleep(0.2)


def made_workspace(folder: Path, items: int, users: int) -> str:
    """Histories of the synthetic log, an untrained SASRec in force, and a night of it in the online store."""
    uri, data = str(folder / "workspace"), folder / "data"
    sizes = ["--users", str(users), "--items", str(items), "--events", str(20 * users)]
    log = ["--log.path", str(data / "log.parquet"), "--log.columns.time", "time"]
    jobs = [
        ["dataset", "synthetic", "--folder", str(data), *sizes],
        ["ingest", "--workspace", uri, *log, "--catalogue.path", str(data / "items.csv")],
    ]
    for job in jobs:
        # In processes of their own: the service brings its own Ray.
        subprocess.run([sys.executable, "-m", "raypipe.cli.main", *job], check=True, stdout=subprocess.DEVNULL)
    model = store_untrained(uri, MODEL)
    workspace = Workspace(uri)
    versions = {name: table.version() for name, table in workspace.tables.items() if table.version() >= 0}
    releases = Releases(workspace.store)
    named = f"{model.name}/{model.hash}"
    assert Models(workspace.store).newest(model.name) is not None
    release = releases.add(Release(named, "", {}, versions["items"]))
    releases.point("champion", release)
    parts = {"release": release.hash, "recommender": named}
    Nights(workspace.store).publish(Night("2026-01-05", versions, parts, {}, "summarize-hierarchical"))
    assert raypipe(["online", "--workspace", uri]) == 0
    return uri


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}"


if __name__ == "__main__":
    main()
