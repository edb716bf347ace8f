"""`raypipe recommend`: the best items of every user, over the whole catalogue."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.config import shaping
from raypipe.errors import UsageError
from raypipe.pipeline.encode import EncodeConfig, EncodeOptions, Encoding, run_encoding
from raypipe.pipeline.encode_units import Recommendations
from raypipe.pipeline.loaded import Loaded
from raypipe.runtime.job import JobResult
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import content_digest

JOB = "recommend"
STEP_VERSION = 1


class RecommendOptions(EncodeOptions):
    """How long the lists are and what may be in them."""

    length: int = shaping(10, "items of each list", ge=1)
    filter_seen: bool = shaping(True, "nothing of a user's own history")
    deny: str | None = shaping(None, "file of item ids that nobody is recommended, a line each")
    only: dict[str, str] = shaping(dict, "attribute → value that an item must have, for example genres: Drama")


class RecommendConfig(RecommendOptions, EncodeConfig):
    """Configuration of `recommend`."""


def run_recommend(config: RecommendConfig) -> JobResult:
    """Lists into `recommendations`, variant `recommend-<model>`; unavailable items are in none.

    Raises UsageError where fewer than `length` items may be recommended.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    loaded = Loaded.of(config, workspace, config.model)
    allowed = allowed_items(loaded.items, config)[: loaded.recommender.items + 1]
    if (left := int(allowed.sum())) < config.length:
        raise UsageError(
            f"Lists of {config.length} were asked for, and {left:,} of the model's {loaded.recommender.items:,} items may be "
            "recommended.",
            "Ask for fewer with --length, or allow more items.",
        )
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "model": loaded.model.hash,
            "length": config.length,
            "filter_seen": config.filter_seen,
            "allowed": content_digest(np.packbits(allowed).tobytes().hex()),
        }
    )
    popular = [item for item in loaded.card.popular if allowed[item]][: config.length]
    rows = Recommendations(config.length, config.filter_seen, allowed, np.array(popular, np.int32))
    encoding = Encoding(JOB, "recommendations", f"{JOB}-{loaded.model.name}", recipe, rows)
    return run_encoding(config, workspace, loaded, encoding, started)


def allowed_items(items: pa.Table, config: RecommendOptions) -> NDArray[np.bool_]:
    """bool [items + 1] by index: available, not denied, with the attributes asked for.

    Raises UsageError for a deny list that cannot be read or an attribute that no item has.
    """
    allowed = np.concatenate([[False], items["available"].to_numpy()])
    if config.deny is not None:
        try:
            denied = set(Path(config.deny).read_text(encoding="utf-8").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"The deny list {config.deny} cannot be read: {error}.", "Write one item id a line."
            ) from None
        allowed[1:] &= [item not in denied for item in items["item_id"].to_pylist()]
    for name, value in config.only.items():
        has = [value in dict(pairs).get(name, ()) for pairs in items["attributes"].to_pylist()]
        if not any(has):
            raise UsageError(
                f"No item has {value!r} in its attribute {name!r}.", "Check `only`; values are compared exactly."
            )
        allowed[1:] &= has
    return allowed
