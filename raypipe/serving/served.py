"""What is served at a moment: a release's recommender and a night's users, loaded, checked and never changed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raypipe.data.id_lists import read_ids
from raypipe.data.recommendable import unknown_denied
from raypipe.errors import AccessError, RaypipeError, UsageError
from raypipe.recommenders.checkpoint import check_catalogue, load_recommender
from raypipe.recommenders.recommender import Recommender, freeze
from raypipe.recommenders.windows import Histories
from raypipe.serving.adapters import ServedAdapter, load_adapters
from raypipe.serving.catalogue import ServedCatalogue
from raypipe.serving.config import ServiceConfig
from raypipe.serving.recommending import ListSpec, ModelInputs, Ranked, recommend, score
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.models import Models, find_model
from raypipe.storage.nights import Night, Nights
from raypipe.storage.online import OnlineStore, version_of
from raypipe.storage.releases import Releases
from raypipe.storage.workspace import Workspace
from raypipe.systems.source import Source

_LOG = logging.getLogger("raypipe.serving")
_PROBES = 8
_SOME_USERS = 20


class UnfitError(RaypipeError):
    """A release was loaded but does not answer as it should. It does not replace the one that does."""


def is_lasting(error: Exception) -> bool:
    """Whether a release that failed to load with this error is unfit.

    It is if it is damaged, its parts do not belong together, or it does not answer. Other failures, of a store or a
    network, may pass.
    """
    return isinstance(error, UsageError | UnfitError) and not isinstance(error, AccessError)


@dataclass(frozen=True)
class Target:
    """What should be served: a release's hash, and a night with the version that is loaded, empty if there is none."""

    release: str
    night: str = ""
    version: str = ""


@dataclass(frozen=True)
class Served:
    """A release's recommender and a night's users, as they are served.

    `table` [items + 1, width] holds the recommender's item states. `states_fit`: the night's states are this
    recommender's, and need not be computed again. `since` is in Unix seconds. `catalogue_version` is that of the items
    table; `denied` are the ids of items that are never recommended. `lm` is the release's language model, `adapters`
    its adapters by name. `some_users` are ids of the night, to look around with. `users` is the number of users of whom
    the recommender keeps something; it falls when users are forgotten.
    """

    target: Target
    recommender_name: str
    recommender: Recommender
    table: Tensor
    catalogue: ServedCatalogue
    popular: Sequence[int]
    states_fit: bool
    since: float
    catalogue_version: int
    denied: frozenset[str] = frozenset()
    lm: str = ""
    adapters: Mapping[str, ServedAdapter] = field(default_factory=dict)
    some_users: Sequence[str] = ()
    users: int = 0

    @cached_property
    def item_states(self) -> NDArray[np.float32]:
        """float32 [items + 1, width]: `table` in the form that language models are shown."""
        return self.table.detach().float().numpy()

    @cached_property
    def source(self) -> Source:
        """The source that systems read, with no users yet."""
        nobody = Histories(np.zeros(0, np.int32), np.zeros(0, np.int64))
        return Source(
            self.recommender, nobody, np.zeros(0, bool), self.catalogue.for_prompts, computed=self.item_states
        )

    def score(self, requests: Sequence[tuple[ModelInputs, NDArray[np.int32]]]) -> list[NDArray[np.float32] | None]:
        return score(self.recommender, self.table, requests)

    def recommend(self, requests: Sequence[tuple[ModelInputs, ListSpec]]) -> list[Ranked]:
        return recommend(self.recommender, self.table, self.catalogue, self.popular, requests)


def in_force(workspace: Workspace) -> Target:
    """The release in force, and the night in force, whether its users are loaded or not.

    Raises UsageError if no release is in force.
    """
    release = Releases(workspace.store).named("champion")
    if release is None or not release.recommender:
        raise UsageError(
            f"No release is in force in the workspace {workspace.uri}.",
            "Put one there with `raypipe release --recommender NAME`.",
        )
    night = Nights(workspace.store).current()
    return Target(release.hash) if night is None else Target(release.hash, night.date, _version(workspace, night))


def find_target(workspace: Workspace, store: OnlineStore, wanted: Target, before: Target | None = None) -> Target:
    """What to serve where `wanted` is in force: `wanted` itself if its night's users are loaded.

    Otherwise it is the release of `wanted` with the night of `before`, or without such a night, with the night that was
    loaded last. Raises OnlineStoreDownError if the store does not answer.
    """
    if wanted.version and store.facts(wanted.version) is not None:
        return wanted
    if before is not None and before.version:
        return replace(before, release=wanted.release)
    nights = Nights(workspace.store)
    for version in reversed(store.versions()):
        facts = store.facts(version)
        if facts is not None and nights.get(facts["night"]) is not None:
            return Target(wanted.release, facts["night"], version)
    return Target(wanted.release)


def _version(workspace: Workspace, night: Night) -> str:
    return _version_of(workspace.uri, canonical_json(asdict(night)))


@lru_cache(maxsize=2)
def _version_of(uri: str, night: str) -> str:
    """The version of a night, whose manifest is given as JSON.

    It is cached: every poll asks for it, and the logs of the night's tables do not change.
    """
    return version_of(Workspace(uri), Night(**json.loads(night)))


def load(config: ServiceConfig, target: Target, before: Served | None = None) -> Served:
    """Read the target's parts from the workspace: safetensors and JSON only, byte for byte as they were stored.

    Only what was kept of users who are forgotten is missing. If `before` differs from the target in its night alone,
    its parts are kept and only the night is changed, so that this takes no longer than `online` waits before it drops
    the previous night.

    Raises UsageError if something is missing, is damaged or does not belong together.
    """
    workspace = Workspace(config.workspace)
    release = Releases(workspace.store).get(target.release)
    night = Nights(workspace.store).get(target.night) if target.night else None
    # Items are only ever added, so the newer of the two catalogues holds every item that release or night refer to.
    version = max(release.catalogue, night.tables["items"] if night is not None else 0)
    denied = read_ids(config.deny, "deny list") if config.deny is not None else frozenset()
    # The night may have been published again, by another recommender than that of the version which is loaded.
    states_fit = (
        night is not None
        and night.release.get("recommender") == release.recommender
        and _version(workspace, night) == target.version
    )
    some_users = _some_users(workspace, night) if night is not None else ()
    models, cache = Models(workspace.store), Path(config.model_cache)
    model = find_model(models, release.recommender)
    rows = models.users(model)
    users = 0 if rows is None else len(rows["keys"])
    if before is not None and (target.release, version, denied, users) == (
        before.target.release,
        before.catalogue_version,
        before.denied,
        before.users,
    ):
        return replace(before, target=target, states_fit=states_fit, since=time.time(), some_users=some_users)
    recommender, card = load_recommender(models.fetch_unharmed(model, cache), users=rows)
    freeze(recommender)
    items = workspace.tables["items"].read(version)
    check_catalogue(card.catalogue, items.sort_by("index")["item_id"].to_pylist(), release.recommender)
    if told := unknown_denied(items, denied):
        _LOG.warning("%s", told)
    catalogue = ServedCatalogue.of(items, denied)
    return Served(
        target,
        release.recommender,
        recommender,
        recommender.item_states(),
        catalogue,
        card.popular,
        states_fit,
        time.time(),
        version,
        denied,
        release.lm,
        load_adapters(models, release, config, catalogue.for_prompts),
        some_users,
        users,
    )


def _some_users(workspace: Workspace, night: Night) -> Sequence[str]:
    users = workspace.tables["histories"].read(night.tables["histories"], ["user_id"], bucket=0)["user_id"]
    return sorted(users.slice(0, _SOME_USERS).to_pylist())


def check(served: Served, recorded: Sequence[tuple[ModelInputs, ListSpec]] = ()) -> None:
    """Check the answers to recorded requests and to made-up ones, which also takes a model's slow first answers.

    Raises UnfitError if scores of an answer are not finite or not in falling order, if it lists an item that may not be
    recommended, or if it is shorter than asked for although more items may be recommended.
    """
    model = served.recommender
    rng = np.random.default_rng(0)
    made_up = [
        (
            ModelInputs.of(rng.integers(1, model.items + 1, rng.integers(1, model.max_length + 1)).astype(np.int32)),
            ListSpec(10),
        )
        for _ in range(_PROBES)
    ]
    # A recorded request may filter by an attribute value that the new catalogue no longer has.
    requests = made_up + [(inputs, spec) for inputs, spec in recorded if _can_be_asked(served.catalogue, spec)]
    for (inputs, spec), ranked in zip(requests, served.recommend(requests), strict=True):
        reason = _flaw(served, inputs, spec, ranked)
        if reason:
            raise UnfitError(
                f"The release {served.target.release[:12]} is not served: {reason}.",
                "The one before stays. Look at the model with `raypipe evaluate`, or go back with `raypipe release --restore`.",
            )


def _can_be_asked(catalogue: ServedCatalogue, spec: ListSpec) -> bool:
    return all(pair in catalogue.holders for pair in spec.only)


def _flaw(served: Served, inputs: ModelInputs, spec: ListSpec, ranked: Ranked) -> str:
    allowed = served.catalogue.allowed(spec.only, served.recommender.items).copy()
    allowed[inputs.items[inputs.items < len(allowed)]] &= not spec.filter_seen
    if spec.deny is not None:
        allowed[spec.deny[spec.deny < len(allowed)]] = False
    if ranked.scores is None:
        return ""
    if not np.isfinite(ranked.scores).all() or (np.diff(ranked.scores) > 0).any():
        return "its scores are no numbers in falling order"
    if not allowed[ranked.items].all():
        return "it recommends what may not be recommended"
    if len(ranked.items) < min(spec.count, int(allowed.sum())):
        return "its lists are too short"
    return ""
