"""Deaths at moments too narrow for chance: before or after one write of the driver or of a worker.

A fault reads `driver before tables/logs`, `worker after ledger/*/units/users-*`, `raylet after ledger/*/journal/* 2`: who
dies (of raylets, that of the worker which writes), on which side of which write, and at which time of such a write in that
process (from 1). Writes are named by their path in the workspace; `tables/<name>` alone is the table's commit. Nothing of
this is in raypipe: the driver below wraps
`Store.put`, `Store.create` and `Table.publish` in its own process, and in its workers' by an actor class that does so first.

A fault may be a prompt instead, `prompt kills 1234` or `prompt hangs 1234` (`DeadlyPrompt`), in every worker and each time.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raypipe.engines.echo import EchoEngine
from raypipe.engines.engine import Decoding, Outcome
from raypipe.language.prompt import Prompt
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
    struck: str

    @staticmethod
    def parse(text: str, struck: str) -> Fault:
        who, when, path, *nth = text.split()
        assert who in {"driver", "worker", "raylet"}, text
        assert when in {"before", "after"}, text
        return Fault(who, when, path, int(nth[0]) if nth else 1, struck)


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
                _die(fault)
            result = write(self, *args, **options)
            if hit and seen == fault.nth and fault.when == "after":
                _die(fault)
            return result

        return wrapped

    Store.put = dying(Store.put, lambda _, path, data: path)  # type: ignore[method-assign]
    Store.create = dying(Store.create, lambda _, path, data: path)  # type: ignore[method-assign]
    Table.publish = dying(Table.publish, lambda table, *_: table.folder)  # type: ignore[method-assign]


def _die(fault: Fault) -> None:
    """SIGKILL, once: of several workers one dies, and what comes after it lives."""
    try:
        os.close(os.open(fault.struck, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if fault.who == "raylet":  # and the worker with it, as if the machine had gone
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DeadlyPrompt:
    """A prompt, by the CRC of its text, at which the echo engine `kills` its process or `hangs`."""

    does: str
    crc: int

    @staticmethod
    def parse(text: str) -> DeadlyPrompt:
        does, crc = text.split()
        assert does in {"kills", "hangs"}, text
        return DeadlyPrompt(does, int(crc))

    def arm(self) -> None:
        generate = EchoEngine.generate

        def deadly(engine: EchoEngine, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Outcome]:
            if any(zlib.crc32(prompt.text.encode()) == self.crc for prompt in prompts):
                if self.does == "hangs":
                    time.sleep(10_000)
                os.kill(os.getpid(), signal.SIGKILL)
            return generate(engine, prompts, decoding)

        EchoEngine.generate = deadly  # type: ignore[method-assign]


def _doomed(arm: Callable[[], None]) -> type[units._Worker]:
    """raypipe's actor, with a fault armed in its process."""

    class Doomed(units._Worker):
        def __init__(self, *args: Any) -> None:
            arm()
            super().__init__(*args)

    return Doomed


def main() -> None:
    """The command line with a fault in it: `CHAOS_FAULT` names it, `CHAOS_STRUCK` is the file a death leaves."""
    from raypipe.cli.main import main as run

    text = os.environ["CHAOS_FAULT"]
    if text.startswith("prompt "):
        units._Worker = _doomed(DeadlyPrompt.parse(text.removeprefix("prompt ")).arm)  # type: ignore[misc]
    else:
        fault = Fault.parse(text, os.environ["CHAOS_STRUCK"])
        if fault.who == "driver":
            arm(fault)
        else:
            units._Worker = _doomed(functools.partial(arm, fault))  # type: ignore[misc]
    sys.exit(run(sys.argv[1:]))
