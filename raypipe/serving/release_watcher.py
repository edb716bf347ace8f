"""Switches a running replica to another release or night, which is loaded beside the old one and checked first."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from raypipe.errors import RaypipeError, UsageError
from raypipe.runtime.memory import return_memory
from raypipe.serving.config import ServiceConfig
from raypipe.serving.queries import ReleaseStatus
from raypipe.serving.recommending import ListSpec, ModelInputs
from raypipe.serving.served import Served, Target, UnfitError, check, find_target, in_force, is_lasting, load
from raypipe.storage.online import OnlineStore, OnlineStoreDownError
from raypipe.storage.releases import Releases
from raypipe.storage.tokens import Token, Tokens
from raypipe.storage.workspace import Workspace

_LOG = logging.getLogger("raypipe.serving")
_RECORDED = 128
_MOST_WAIT_S = 60.0  # most seconds until what could not be loaded is tried again
_DOUBLINGS = 10
_MEMORY_S = 60.0  # seconds between two times that memory which requests freed is returned to the system


@dataclass(frozen=True)
class _HeldBack:
    """A target that could not be loaded: how often, until when it is left alone (monotonic seconds), and why."""

    failed: int
    until: float
    reason: str


class ReleaseWatcher:
    """Polls the workspace every `watch_s` seconds, and holds what is served at the moment.

    A request keeps what it began with. A release that is damaged or fails its check is refused, with the reason, until
    another one is in force. So is a night if the release fails its check with that night's catalogue. What was served
    before stays. A workspace or a store that does not answer changes nothing, and is tried again: at the next poll, and
    then ever more rarely. Tokens are read in a thread of their own, as a release may take minutes to load.

    `check_lm` raises UnfitError if the language model of a release does not answer with that version of the catalogue.
    Without `check_lm` the watcher polls, but marks nothing as served.
    """

    def __init__(
        self, config: ServiceConfig, store: OnlineStore, check_lm: Callable[[str, int], None] | None = None
    ) -> None:
        self.config, self.store, self.check_lm = config, store, check_lm
        self.workspace = Workspace(config.workspace)
        self._unfit: dict[Target, str] = {}
        self._held_back: dict[Target, _HeldBack] = {}
        self._wanted = in_force(self.workspace)
        self.tokens: Mapping[str, Token] = {}
        self.refresh_tokens()
        self._memory_returned = time.monotonic()
        self._recorded: deque[tuple[ModelInputs, ListSpec]] = deque(maxlen=_RECORDED)
        self._stop = threading.Event()
        self.served = self._initial()

    def record(self, inputs: ModelInputs, spec: ListSpec) -> None:
        """Keep a request, in memory only, to ask the next release the same.

        Its state is left out: a night computed that with the current release.
        """
        self._recorded.append((replace(inputs, state=None), spec))

    def start(self) -> None:
        for look in (self._look, self.refresh_tokens):
            threading.Thread(target=self._run, args=(look,), name=f"watcher-{look.__name__}", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def refresh_tokens(self) -> None:
        """Read the tokens that are valid now. Raises RaypipeError or OSError if they cannot be read."""
        self.tokens = Tokens(self.workspace.store).valid()

    def poll(self) -> None:
        """Switch to the release and night that are in force. Raises RaypipeError or OSError if they cannot be read."""
        self._wanted = in_force(self.workspace)
        target = find_target(self.workspace, self.store, self._wanted, self.served.target)
        # If the release in force cannot be served, its night still is, with the release that is served now.
        targets = dict.fromkeys((target, replace(target, release=self.served.target.release)))
        # What is no longer in force is forgotten: it may come back mended.
        self._unfit = {one: reason for one, reason in self._unfit.items() if one in targets}
        self._held_back = {one: held for one, held in self._held_back.items() if one in targets}
        for one in targets:
            if one == self.served.target or self._switch(one):
                return

    @property
    def night_in_force(self) -> str | None:
        """The date of the night in force, whether it is served or not; None if there is none."""
        return self._wanted.night or None

    @property
    def refused(self) -> dict[str, str]:
        """Why releases and nights are not served, by release, or by `night DATE` for a night of the served release."""
        return self._told(self._unfit)

    @property
    def held_back(self) -> dict[str, str]:
        """As `refused`, for releases and nights that are tried again."""
        return self._told({one: held.reason for one, held in self._held_back.items()})

    def _told(self, reasons: Mapping[Target, str]) -> dict[str, str]:
        mine = self.served.target.release
        return {f"night {one.night}" if one.release == mine else one.release: told for one, told in reasons.items()}

    def release_status(self) -> ReleaseStatus:
        """What is served, and what was refused."""
        served = self.served
        return ReleaseStatus(
            release=served.target.release,
            recommender=served.recommender_name,
            lm=served.lm or None,
            adapters={name: adapter.kind for name, adapter in served.adapters.items()},
            items=served.recommender.items,
            night=served.target.night or None,
            night_in_force=self.night_in_force,
            night_behind=self._wanted.version != served.target.version,
            since=served.since,
            refused=self.refused,
            held_back=self.held_back,
        )

    def _switch(self, target: Target) -> bool:
        """Load and check the target, and serve it if it is fit. Returns whether it is served now."""
        held = self._held_back.get(target)
        if target in self._unfit or (held is not None and time.monotonic() < held.until):
            return False
        started = time.monotonic()
        try:
            served = self._load(target, self.served)
            checked = self.served.target.release, self.served.catalogue_version
            if self.check_lm is not None and (target.release, served.catalogue_version) != checked:
                self.check_lm(target.release, served.catalogue_version)
            self._mark(served)
        except Exception as error:
            self._reject(target, error)
            return False
        self.served = served
        self._held_back = {one: held for one, held in self._held_back.items() if one != target}
        self._return_memory()
        _LOG.info(
            "release %s and night %s are served after %.1f s",
            target.release[:12],
            target.night,
            time.monotonic() - started,
        )
        return True

    def _reject(self, target: Target, error: Exception) -> None:
        """Note that the target is not served, for good or until it is tried again, and why."""
        if is_lasting(error):
            self._unfit = {**self._unfit, target: str(error)}  # a new dict: another thread may be reading the old one
            _LOG.error("%s", error)
            return
        failed = self._held_back[target].failed if target in self._held_back else 0
        wait_s = min(_MOST_WAIT_S, self.config.watch_s * 2 ** min(failed, _DOUBLINGS)) if failed else 0.0
        reason = str(error) if isinstance(error, RaypipeError) else f"{type(error).__name__}; the log tells more"
        held = _HeldBack(failed + 1, time.monotonic() + wait_s, reason)
        self._held_back = {**self._held_back, target: held}
        _LOG.warning(
            "release %s and night %s cannot be loaded, and are tried again: %s",
            target.release[:12],
            target.night,
            error,
            exc_info=not isinstance(error, RaypipeError | OSError),
        )

    def _initial(self) -> Served:
        """What is served first.

        With `check_lm` it is the release that was served last: the first poll switches to the one in force, once that
        is checked. If none was served, or it is unfit, it is the release in force. If that cannot be loaded, it is
        again the one that was served last, so that a new replica does not fail where the running ones answer.

        While the online store is down the replica begins without a night, and answers by history as running replicas
        do. If it did not start, an outage of the store would become one of the service.
        """
        try:
            target = find_target(self.workspace, self.store, self._wanted)
        except OnlineStoreDownError as error:
            _LOG.warning("no night is served until the online store answers: %s", error)
            target = Target(self._wanted.release)
        last = Releases(self.workspace.store).named("served")
        before = replace(target, release=last.hash) if last is not None and last.hash != target.release else None
        if self.check_lm is not None and before is not None:
            with contextlib.suppress(UsageError, UnfitError):
                return self._load(before)
        try:
            served = self._load(target)
        except (RaypipeError, OSError) as error:
            if before is None:
                raise
            self._reject(target, error)
            return self._load(before)
        self._mark(served)
        return served

    def _load(self, target: Target, before: Served | None = None) -> Served:
        served = load(self.config, target, before)
        check(served, list(self._recorded))
        return served

    def _mark(self, served: Served) -> None:
        releases, release = Releases(self.workspace.store), served.target.release
        last = releases.named("served")
        if self.check_lm is not None and (last is None or last.hash != release):
            releases.point("served", releases.get(release))

    def _run(self, look: Callable[[], None]) -> None:
        while not self._stop.wait(self.config.watch_s):
            try:
                look()
            except Exception as error:  # the next look may succeed
                _LOG.warning("what is in force cannot be seen: %s", error)

    def _look(self) -> None:
        try:
            self.poll()
        finally:
            if time.monotonic() - self._memory_returned >= _MEMORY_S:
                self._return_memory()

    def _return_memory(self) -> None:
        return_memory()
        self._memory_returned = time.monotonic()
