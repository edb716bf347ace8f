"""The record of what `align` measured, for `report`: one form for every system and every way of asking."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from raypipe.config import Config
from raypipe.pipeline.asked_anew import asked_anew
from raypipe.pipeline.held_out import Cut
from raypipe.pipeline.judge_engines import Identities
from raypipe.pipeline.made_of import parts_of, settings_of
from raypipe.recommenders.config import ModelName
from raypipe.runtime.job import JobResult
from raypipe.storage.evaluations import Evaluation, Evaluations, Measured
from raypipe.storage.models import Models, find_model
from raypipe.storage.workspace import Workspace

if TYPE_CHECKING:
    from raypipe.pipeline.align_options import AlignConfig

_READS_STATES = {"recinterpreter", "recexplainer"}
# Scorers that answer the same questions by themselves, and are no variant of a model.
_ALONE = {"popularity", "transitions", "boosted trees", "boosted trees on facts", *get_args(ModelName)}
# Metrics that are means of values from 0 to 1 over all asked users. If a system gives no interval, a bound stands in.
_SHARES = re.compile(
    r"(recovery|residual|oracle|order|valid|rouge_l|T\d .*|(residual|oracle) valid|(HR|Recall|NDCG|MRR)@\d+)$"
)


def record(config: AlignConfig, result: JobResult, judges: Identities | None = None) -> None:
    """Store the record in the workspace. The model may belong to another workspace.

    `judges` judged a stored model; one that was trained has its judges in its lineage.
    """
    workspace = config.open_workspace()
    ((name, content),) = result.models.items()
    home = Workspace(config.adapter_workspace) if config.adapter_workspace is not None else workspace
    away = home.uri != workspace.uri
    models = [Models(one.store) for one in ((home, workspace) if away else (home,))]
    lineage = find_model(models[0], f"{name}/{content}").lineage
    given: Config = getattr(config, config.system)
    asked: dict[str, Any] = {"asked": config.asked, "answer_tokens": config.answer_tokens}
    recommender = ""
    names: dict[str, str] = {}
    if config.system in _READS_STATES or config.system == "trsr":
        beside = find_model(Models(workspace.store), config.model)
        recommender, asked["recommender"] = beside.name, f"{beside.name}/{beside.hash}"
    if config.system == "trsr":
        asked["summaries"] = config.summaries
        if (left_out := beside.lineage["hold_out"]) > config.hold_out:
            # The protocol's words are of what else is in the table.
            names[beside.name] = f"{beside.name}-without the last {left_out} events"
    settings = settings_of(lineage)
    anew: dict[str, Any] = {}
    if config.adapter is not None:
        if config.system in _READS_STATES:
            settings["trained_beside"] = lineage["recommender"]
        settings |= asked
        anew = {"measured_anew": True}
        if config.system == "guided":
            anew |= given.model_dump(mode="json", include=given.model_fields_set)
        else:
            anew |= asked_anew(config.system, given, lineage["options"])
        if judges:
            anew["judges"] = judges  # rather than by a name that may mean another model tomorrow
    if away:
        anew["trained_in"] = home.uri.rstrip("/").rsplit("/", 1)[-1]
    options, settings = {**lineage["options"], **anew}, {**settings, **anew}
    cut = Cut(config.hold_out, config.held_out_share)
    Evaluations(workspace.store).put(
        Evaluation(
            job="align",
            name=name,
            hash=content,
            recommender=recommender if config.system in _READS_STATES else "",
            protocol=_protocol(config, options, cut, result.metrics),
            seed=int(lineage["seed"]),
            figures=_figures(name, names, result.metrics, result.intervals),
            settings=settings,
            training=lineage["training"],
            versions=lineage["versions"],
            parts=parts_of(models, settings),
        ),
        {**asked, **asdict(cut), "beside": config.beside, "against": getattr(given, "against", None), **options},
    )


def _figures(
    name: str, names: Mapping[str, str], metrics: Mapping[str, Any], intervals: Mapping[str, float]
) -> dict[str, dict[str, Measured]]:
    """Metrics by scorer and figure, with half-widths. Values that are None or not finite are left out.

    `shuffled states: recovery` is a figure of a control beside the model, `popularity: Recall@5` one of a separate
    scorer, and `above HASH: Recall@3` one of the model: how far it is above another model. `names` maps scorers to the
    name they get in the record. `intervals` are half-widths by the same names as `metrics`.
    """
    found: dict[str, dict[str, Measured]] = {}
    asked = int(metrics.get("asked", 0))
    for metric, value in metrics.items():
        *beside, figure = metric.split(": ")
        if value is not None and math.isfinite(value):
            if beside and beside[0] in _ALONE:
                scorer = names.get(beside[0], beside[0])
            elif beside and beside[0].startswith("above "):
                scorer, figure = name, metric
            else:
                scorer = ", ".join([name, *beside])
            bound = _half_width(value, asked) if _SHARES.match(figure) else None
            found.setdefault(scorer, {})[figure] = Measured(float(value), intervals.get(metric, bound))
    return found


def _half_width(share: float, asked: int) -> float | None:
    """The largest possible half-width of the 95 % interval of a mean of `asked` values from 0 to 1.

    No values with that mean vary more than zeros and ones do. None if nobody was asked, or if the mean is 0 or 1.
    """
    variance = share * (1 - share)
    return round(1.96 * math.sqrt(variance / asked), 6) if asked and variance > 0 else None


def _protocol(config: AlignConfig, options: Mapping[str, Any], cut: Cut, metrics: Mapping[str, Any]) -> str:
    """The protocol in words: all that the figures of the model depend on, and those of the floors beside it."""
    if config.system == "lancer":
        seen = "filtered" if options.get("filter_seen") else "kept"
        told = f"leave-one-out, whole catalogue, seen items {seen}, {cut.words}"
        # If everybody is asked, it is the protocol of recommenders, which may stand in one table with it.
        everybody = metrics["asked"] == metrics.get("askable")
        return told if everybody else f"{told}, {metrics['asked']:.0f} users asked"
    if config.system == "trsr":
        drawn = options["candidates"]
        seed = f" of draw {drawn['seed']}" if drawn["seed"] else ""
        candidates = f"{drawn['negatives'] + 1} candidates{seed}"
        shown = f"last {options['history']} events shown"
        return f"leave-one-out, {candidates}, {shown}, {cut.words}, {metrics['asked']:.0f} users asked"
    last = "last event" if config.hold_out == 1 else f"last {config.hold_out} events"
    asked = "held out from every training" if metrics.get("unseen_by_all", 1) else "who may have been trained on"
    return f"before everybody's {last}, users {asked} ({100 * cut.held_out_share:g}%)"
