"""The change from one release or night to another, in a running replica: loaded beside the old, checked, then switched."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from raypipe.errors import UsageError
from raypipe.serving.config import ServiceConfig
from raypipe.serving.queries import Standing
from raypipe.serving.recommending import Known, Wanted
from raypipe.serving.served import Served, Target, UnfitError, check, find_target, load
from raypipe.storage.nights import Nights
from raypipe.storage.online import OnlineStore
from raypipe.storage.releases import Releases
from raypipe.storage.tokens import Token, Tokens
from raypipe.storage.workspace import Workspace

_LOG = logging.getLogger("raypipe.serving")
_RECORDED = 128


class Watch:
    """Looks at the workspace every `watch_s`, and holds what is served at the moment.

    A request keeps what it began with. A release that cannot be loaded or fails its check is refused, with the reason, until
    another one is in force, and what was served before stays; a workspace or a store that does not answer changes nothing.
    `prove` raises UnfitError for a release whose language model does not answer of a catalogue in that version; without it this
    looks, and marks nothing as served.
    """

    def __init__(
        self, config: ServiceConfig, store: OnlineStore, prove: Callable[[str, int], None] | None = None
    ) -> None:
        self.config, self.store, self.prove = config, store, prove
        self.workspace = Workspace(config.workspace)
        self.refused: dict[str, str] = {}
        self.night_in_force: str | None = None
        self.tokens: Mapping[str, Token] = Tokens(self.workspace.store).valid()
        self._recorded: deque[tuple[Known, Wanted]] = deque(maxlen=_RECORDED)
        self._stop = threading.Event()
        self.served = self._first()

    def record(self, known: Known, wanted: Wanted) -> None:
        """Keep a request, in memory alone, to ask the next release the same."""
        self._recorded.append((known, wanted))

    def start(self) -> None:
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def look(self) -> None:
        """Take up what is in force by now. Raises RaypipeError or OSError where it cannot be seen."""
        self.tokens = Tokens(self.workspace.store).valid()
        night = Nights(self.workspace.store).current()
        self.night_in_force = night.date if night is not None else None
        target = find_target(self.workspace, self.store, self.served.target)
        # Once another release is in force, this one may come back mended.
        self.refused = {name: reason for name, reason in self.refused.items() if name == target.release}
        if target.release in self.refused:
            target = replace(target, release=self.served.target.release)
        if target != self.served.target:
            self._switch(target)

    def standing(self) -> Standing:
        """What is served, and what was refused."""
        served = self.served
        return Standing(
            release=served.target.release,
            recommender=served.recommender_name,
            lm=served.lm or None,
            adapters={name: reader.kind for name, reader in served.readers.items()},
            items=served.recommender.items,
            night=served.target.night or None,
            night_in_force=self.night_in_force,
            since=served.since,
            refused=self.refused,
        )

    def _switch(self, target: Target) -> None:
        started = time.monotonic()
        try:
            served = self._loaded(target)
            if self.prove is not None and target.release != self.served.target.release:
                self.prove(target.release, served.catalogue_version)
        except (UsageError, UnfitError) as error:
            self.refused[target.release] = str(error)
            _LOG.error("%s", error)
            return
        self._mark(served)
        self.served = served
        _LOG.info(
            "release %s and night %s are served after %.1f s",
            target.release[:12],
            target.night,
            time.monotonic() - started,
        )

    def _first(self) -> Served:
        """What was served last, for what is in force by now is taken up by the first look, once it is proven; or if nothing
        was, what is in force. Where that is unfit a new replica must not be the one without."""
        target = find_target(self.workspace, self.store)
        last = Releases(self.workspace.store).named("served")
        before = replace(target, release=last.hash) if last is not None and last.hash != target.release else None
        if self.prove is not None and before is not None:
            with contextlib.suppress(UsageError, UnfitError):
                return self._loaded(before)
        try:
            served = self._loaded(target)
        except (UsageError, UnfitError) as error:
            if before is None:
                raise
            self.refused[target.release] = str(error)
            _LOG.error("%s", error)
            return self._loaded(before)
        self._mark(served)
        return served

    def _loaded(self, target: Target) -> Served:
        served = load(self.config, target)
        check(served, list(self._recorded))
        return served

    def _mark(self, served: Served) -> None:
        releases, release = Releases(self.workspace.store), served.target.release
        last = releases.named("served")
        if self.prove is not None and (last is None or last.hash != release):
            releases.point("served", releases.get(release))

    def _run(self) -> None:
        while not self._stop.wait(self.config.watch_s):
            try:
                self.look()
            except Exception as error:  # the next look may see more
                _LOG.warning("what is in force cannot be seen: %s", error)
