"""Deaths at moments too narrow for chance: before or after one write of the driver or of a worker.

A fault reads `driver before tables/logs`, `worker after ledger/*/units/users-*`, `driver before nights/current.json 1`: who
dies, on which side of which write, and at which time of such a write in that process (from 1). Writes are named by their
path in the workspace; `tables/<name>` alone is the table's commit. Nothing of this is in raypipe: the driver below wraps
`Store.put`, `Store.create` and `Table.publish` in its own process, and in its workers' by an actor class that does so first.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raypipe.runtime import units
from raypipe.storage.store import Store
from raypipe.storage.tables import Table


@dataclass(frozen=True)
class Fault:
    """See the module."""

    who: str
    when: str
    path: str
    nth: int

    @staticmethod
    def parse(text: str) -> Fault:
        who, when, path, *nth = text.split()
        assert who in {"driver", "worker"}, text
        assert when in {"before", "after"}, text
        return Fault(who, when, path, int(nth[0]) if nth else 1)


def arm(fault: Fault) -> None:
    """Make this process die at the fault's moment."""
    seen = 0

    def dying(write: Callable[..., Any], path_of: Callable[..., str]) -> Callable[..., Any]:
        @functools.wraps(write)
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal seen
            hit = fnmatch.fnmatchcase(path_of(self, *args), fault.path)
            seen += hit
            if hit and seen == fault.nth and fault.when == "before":
                _die()
            result = write(self, *args, **options)
            if hit and seen == fault.nth and fault.when == "after":
                _die()
            return result

        return wrapped

    Store.put = dying(Store.put, lambda _, path, data: path)  # type: ignore[method-assign]
    Store.create = dying(Store.create, lambda _, path, data: path)  # type: ignore[method-assign]
    Table.publish = dying(Table.publish, lambda table, *_: table.folder)  # type: ignore[method-assign]


def _die() -> None:
    """SIGKILL, once: of several workers one dies, and what comes after it lives."""
    try:
        os.close(os.open(os.environ["CHAOS_STRUCK"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class DoomedWorker(units._Worker):
    """raypipe's actor, with the fault armed in its process."""

    def __init__(self, *args: Any) -> None:
        arm(Fault.parse(os.environ["CHAOS_FAULT"]))
        super().__init__(*args)


def main() -> None:
    """The command line with a fault in it: `CHAOS_FAULT` names it, `CHAOS_STRUCK` is the file it leaves."""
    from raypipe.cli.main import main as run

    fault = Fault.parse(os.environ["CHAOS_FAULT"])
    if fault.who == "driver":
        arm(fault)
    else:
        units._Worker = DoomedWorker  # type: ignore[misc]
    sys.exit(run(sys.argv[1:]))
