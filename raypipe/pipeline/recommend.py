"""`raypipe recommend`: list the best items of every user, over the whole catalogue."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.config import free, shaping
from raypipe.data.id_lists import read_ids
from raypipe.data.recommendable import (
    UnknownValueError,
    attributes_of,
    holders_of,
    narrowed,
    recommendable,
    unknown_denied,
)
from raypipe.errors import UsageError
from raypipe.pipeline.encode import EncodeConfig, EncodeOptions, Encoding, by_recommender, run_encoding
from raypipe.pipeline.encode_units import Makes
from raypipe.pipeline.job import CapOptions
from raypipe.pipeline.lancer_lists import ByWriter, LoadsWriter
from raypipe.pipeline.loaded import Loaded
from raypipe.pipeline.recommender_rows import Recommendations
from raypipe.pipeline.sequences import pinned_versions
from raypipe.recommenders.scoring import most_popular
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import content_digest
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.workspace import Workspace
from raypipe.systems.lancer import NAME as LANCER

JOB = "recommend"
STEP_VERSION = 3
_WRITTEN_STEP_VERSION = 4
"""The step version for lists that a language model writes."""


class RecommendOptions(CapOptions, EncodeOptions):
    """How long the lists are, what may be in them, and what a language model that writes them may spend."""

    length: int = shaping(10, "items of each list", ge=1)
    filter_seen: bool = shaping(True, "nothing of a user's own history")
    deny: str | None = shaping(None, "file of item ids that nobody is recommended, a line each")
    only: dict[str, str] = shaping(dict, "attribute → value that an item must have, for example genres: Drama")
    answer_tokens: int = shaping(96, "most tokens of an item's line, where a language model writes them (lancer)", ge=1)
    micro_batch: int = free(64, "users a worker gives a language model at a time (lancer)", ge=1)


class RecommendConfig(RecommendOptions, EncodeConfig):
    """Configuration of `recommend`."""


def run_recommend(config: RecommendConfig, night: NightRuns | None = None) -> JobResult:
    """Write lists to `recommendations`, variant `recommend-<model>`. Unavailable items are in none of them.

    `night` is as for `run_encoding`. Raises UsageError if fewer than `length` items may be recommended.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    model = find_model(Models(workspace.store), config.model)
    if model.name == LANCER:
        return run_encoding(config, workspace, model, _written(config, workspace, model), started, night)
    loaded = Loaded.of(config, workspace, config.model)
    allowed = _enough(allowed_items(loaded.items, config)[: loaded.recommender.items + 1], config.length)
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "model": loaded.model.hash,
            "length": config.length,
            "filter_seen": config.filter_seen,
            "allowed": content_digest(np.packbits(allowed).tobytes().hex()),
        }
    )
    popular = most_popular(loaded.card.popular, allowed, config.length).astype(np.int32)
    rows = Recommendations(config.length, config.filter_seen, allowed, popular)
    encoding = _encoding(config, loaded.model, recipe, by_recommender(config, workspace, loaded.model, rows))
    return run_encoding(config, workspace, loaded.model, encoding, started, night)


def _written(config: RecommendConfig, workspace: Workspace, model: Model) -> Encoding:
    """What to compute for lists that a language model writes."""
    items = workspace.tables["items"].read(pinned_versions(workspace)["items"]).sort_by("index")
    loads = LoadsWriter.of(config, workspace, model, items, config.answer_tokens)
    allowed = _enough(allowed_items(items, config), config.length)
    recipe = fingerprint(
        {
            "step": _WRITTEN_STEP_VERSION,
            "model": model.hash,
            "lm": loads.lm_hash,
            "lines": content_digest(*loads.options.lines(loads.catalogue), *loads.options.contents(loads.catalogue)),
            "answer_tokens": config.answer_tokens,
            "length": config.length,
            "filter_seen": config.filter_seen,
            "allowed": content_digest(np.packbits(allowed).tobytes().hex()),
        }
    )
    makes = ByWriter(loads, config.device, config.length, config.filter_seen, allowed, config.micro_batch)
    return _encoding(config, model, recipe, makes)


def _encoding(config: RecommendConfig, model: Model, recipe: str, makes: Makes) -> Encoding:
    limits, reject_limit = config.limits(), RejectLimit(config.max_reject_rate)
    return Encoding(
        JOB, "recommendations", f"{JOB}-{model.name}", recipe, makes, limits=limits, reject_limit=reject_limit
    )


def _enough(allowed: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """`allowed` itself. Raises UsageError if lists of this length would be longer than what may be in them."""
    if (left := int(allowed.sum())) < length:
        raise UsageError(
            f"Lists of {length} were asked for, and {left:,} of the model's {len(allowed) - 1:,} items may be recommended.",
            "Ask for fewer with --length, or allow more items.",
        )
    return allowed


def allowed_items(items: pa.Table, config: RecommendOptions) -> NDArray[np.bool_]:
    """Which items may be recommended, bool [items + 1] by index: available, not denied, with the attributes asked for.

    Raises UsageError for a deny list that cannot be read or an attribute that no item has.
    """
    denied = read_ids(config.deny, "deny list") if config.deny is not None else frozenset()
    if told := unknown_denied(items, denied):
        say(f"{JOB}: {told}", "warning")
    allowed = recommendable(items, denied)
    if not config.only:
        return allowed
    try:
        return narrowed(allowed, holders_of(attributes_of(items)), config.only.items())
    except UnknownValueError as error:
        raise UsageError(str(error), "Check --only.") from None
