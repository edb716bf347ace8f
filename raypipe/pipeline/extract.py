"""`raypipe extract`: compute the states of every user, after the last event or after each, and those of the items."""

from __future__ import annotations

import time
from typing import Literal

from raypipe.config import shaping
from raypipe.pipeline.encode import EncodeConfig, EncodeOptions, Encoding, by_recommender, run_encoding
from raypipe.pipeline.loaded import Loaded
from raypipe.pipeline.recommender_rows import States
from raypipe.runtime.job import JobResult
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.night_runs import NightRuns

JOB = "extract"
STEP_VERSION = 3


class ExtractOptions(EncodeOptions):
    """Which states are extracted."""

    positions: Literal["last", "all"] = shaping(
        "last", "one state per user, after the last event, or one after every event"
    )
    vectors: Literal["states", "queries"] = shaping(
        "states", "the states, or what item vectors are multiplied with: dreamrec's oracles"
    )


class ExtractConfig(ExtractOptions, EncodeConfig):
    """Configuration of `extract`."""


def state_recipe(model: str, positions: str = "last", vectors: str = "states") -> str:
    """What a state depends on beside its history; `model` is the recommender's content hash."""
    return fingerprint({"step": STEP_VERSION, "model": model, "positions": positions, "vectors": vectors})


def run_extract(config: ExtractConfig, night: NightRuns | None = None) -> JobResult:
    """Write states to `hidden_states` and `item_states`, variant `extract-<model>` with `-queries` and `-all` as asked.

    `night` is as for `run_encoding`.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    loaded = Loaded.of(config, workspace, config.model)
    recipe = state_recipe(loaded.model.hash, config.positions, config.vectors)
    oracles = config.vectors == "queries"
    variant = (
        f"{JOB}-{loaded.model.name}" + ("-queries" if oracles else "") + ("-all" if config.positions == "all" else "")
    )
    makes = by_recommender(config, workspace, loaded.model, States(config.positions, oracles))
    states = loaded.recommender.item_states().detach().float().numpy()
    encoding = Encoding(JOB, "hidden_states", variant, recipe, makes, states)
    return run_encoding(config, workspace, loaded.model, encoding, started, night)
