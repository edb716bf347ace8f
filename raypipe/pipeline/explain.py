"""`raypipe explain`: why an item is recommended to a user, in words.

An adapter of RecExplainer reads a user's history and state, decides whether the item fits, and says why. It explains
everybody's top recommendation, or the pairs of a file. Only pairs that are new or whose history changed are computed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from raypipe.config import Config, free, shaping
from raypipe.engines.checks import AnswerChecks
from raypipe.engines.engine import Decoding, EngineConfig
from raypipe.errors import UsageError
from raypipe.language.adapters import read_card
from raypipe.pipeline.explain_units import FIGURES, TABLE, ExplainBucket, ExplainTask
from raypipe.pipeline.job import BatchConfig, CapOptions, cost_of, scope_of
from raypipe.pipeline.loaded import BUILTIN, Loaded, is_builtin, lm_beside
from raypipe.pipeline.user_results import users_result
from raypipe.runtime.job import JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.runtime.publishing import bucket_parts
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.runtime.session import open_session
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import WHOLE, Receipt, Unit, Usage
from raypipe.storage.makers import makers
from raypipe.storage.models import Model, Models, find_adapter
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.releases import Release
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace
from raypipe.systems.recexplainer import ExplainerConfig

JOB = "explain"
STEP_VERSION = 4


class ExplainOptions(CapOptions, ModelCache):
    """Which adapter and engine explain, which pairs, and what the explanations attend to."""

    adapter: str = free("recexplainer-h", "NAME, for its newest, or NAME/HASH of an adapter made by `align`")
    engine: EngineConfig = free(
        lambda: EngineConfig(lm=BUILTIN), "what generates; lm is the one the adapter was trained beside"
    )
    pairs: str | None = free(
        None, "CSV file with the columns user_id and item_id; unset: everybody's top recommendation"
    )
    focus: str = shaping("", "what explanations attend to, for example genres")
    decoding: Decoding = shaping(lambda: Decoding(max_new_tokens=150), "of the explanation")
    checks: AnswerChecks = shaping(AnswerChecks, "when an explanation is none")
    micro_batch: int = free(64, "pairs a worker gives the engine at a time", ge=1)


class ExplainConfig(ExplainOptions, BatchConfig):
    """Configuration of `explain`."""


class ExplainPolicy(Config):
    """Whether a night explains, and how."""

    explain_policy: Literal["never", "nightly"] = free(
        "never", "whether everybody's top recommendation is explained, where the release in force holds explain.adapter"
    )
    explain: ExplainOptions = shaping(ExplainOptions, "the explanations, by the adapter of the release in force")

    def of_release(self, workspace: Workspace, release: Release) -> ExplainOptions | None:
        """The options with the release's adapter and language model; None if nothing is to be explained."""
        name, _, wanted = self.explain.adapter.partition("/")
        content = release.adapters.get(name)
        if self.explain_policy == "never" or content is None or not content.startswith(wanted):
            return None
        engine = self.explain.engine
        if engine.lm == BUILTIN and all(model.hash != release.lm for model in Models(workspace.store).all("lm")):
            engine = engine.model_copy(update={"lm": release.lm})
        return self.explain.model_copy(update={"adapter": f"{name}/{content}", "engine": engine})


@dataclass(frozen=True)
class Explainer:
    """The resolved and checked models: the adapter, its recommender, and the language model.

    `lm` is the workspace's own language model, None if the adapter reads with another. `recipe` is the fingerprint of
    what an explanation depends on beside its user and item.
    """

    adapter: Model
    loaded: Loaded
    lm: Model | None
    system: ExplainerConfig
    recipe: str

    @classmethod
    def of(cls, config: ExplainOptions, workspace: Workspace) -> Explainer:
        """Resolve and check the models.

        Raises UsageError for an adapter of another system than RecExplainer, for a language model it was not trained
        beside, and for an engine that reads no adapter.
        """
        adapter = find_adapter(Models(workspace.store), config.adapter, "recexplainer")
        if not config.engine.capabilities.logprobs:
            raise UsageError(
                f"The engine {config.engine.engine} cannot tell how likely an answer is, nor read an adapter.",
                "Choose --engine.engine transformers.",
            )
        folder = config.fetch(workspace, adapter)
        card = read_card(folder)
        loaded = Loaded.of(config, workspace, card.recommender)
        lm = lm_beside(config, workspace, card, config.engine.lm) if is_builtin(config.engine.lm) else None
        engine = config.engine.model_copy(update={"adapter": str(folder)})
        if lm is not None:
            engine = engine.model_copy(update={"lm": str(config.fetch(workspace, lm))})
        identity = engine.identity()
        if identity["model"] != card.lm:
            raise UsageError(
                f"The adapter {adapter.name} was trained beside another language model than {config.engine.lm}.",
                "Name that one with --engine.lm, or train another adapter with `raypipe align`.",
            )
        system = ExplainerConfig.model_validate(adapter.lineage["options"])
        recipe = fingerprint(
            {
                "step": STEP_VERSION,
                "config": config.shaping_values(),
                "engine": identity,
                "system": system.shaping_values(),
            }
        )
        return cls(adapter, loaded, lm, system, recipe)

    def variant(self, config: ExplainOptions) -> str:
        return f"{JOB}-{self.adapter.name}" + ("-pairs" if config.pairs is not None else "")

    @property
    def recommended(self) -> str:
        """The variant of the lists whose first items are explained."""
        return f"recommend-{self.loaded.model.name}"

    def check_lists(self, workspace: Workspace) -> None:
        """Raise UsageError unless the adapter's own recommender made the lists whose first items are explained.

        They have one variant for all recommenders of a name. The ledger tells which of them made the published ones.
        """
        mine = self.loaded.model
        named = f"{mine.name}/{mine.hash}"
        first = f"Run `raypipe recommend --model {named}` first"
        runs = makers(workspace.ledger("recommend"), self.recommended)
        others = {content for run in runs if (content := str(run.manifest["facts"]["model"])) != mine.hash}
        if not runs:
            raise UsageError(
                f"The adapter {self.adapter.name} explains what {named} recommends, and no lists of that recommender are known here.",
                f"{first}, or name pairs with --pairs.",
            )
        if others:
            raise UsageError(
                f"The adapter {self.adapter.name} explains what {named} recommends, and the published lists {self.recommended} are "
                f"of {' and '.join(f'{mine.name}/{content}' for content in sorted(others))}.",
                f"{first}, name an adapter that `raypipe align` trained beside the other recommender with --adapter, or name pairs "
                "with --pairs.",
            )

    def task(
        self,
        config: ExplainOptions,
        workspace: Workspace,
        versions: dict[str, int],
        pairs: pa.Table | None,
        scope: str = WHOLE,
        users: Sequence[str] | None = None,
    ) -> ExplainTask:
        """The work that all units share, over the tables' `versions`."""
        return ExplainTask(
            workspace=workspace,
            scope=scope,
            variant=self.variant(config),
            recipe=self.recipe,
            versions=versions,
            recommender=self.loaded.model,
            adapter=self.adapter,
            lm=self.lm,
            engine=config.engine,
            system=self.system,
            focus=config.focus,
            decoding=config.decoding,
            checks=config.checks,
            recommended=self.recommended,
            pairs=pairs,
            users=pa.array(users, pa.string()) if users is not None else None,
            micro_batch=config.micro_batch,
            model_cache=Path(config.model_cache),
        )


def run_explain(config: ExplainConfig, night: NightRuns | None = None) -> JobResult:
    """Write explanations to the table `explanations`, variant `explain-<adapter>`.

    Those of a file's pairs have the variant `explain-<adapter>-pairs`. As a step of `night` the job spends at most what
    the night left of the caps. Raises UsageError before work starts: as `Explainer.of` does, if the published lists are
    not those of the adapter's recommender, and for pairs of unknown users or items.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    tracking = config.open_tracking(workspace)
    workspace.require_info()
    explainer = Explainer.of(config, workspace)
    pairs = read_pairs(config, workspace, explainer)
    canary = config.canary_users(workspace)
    # Other pairs, or other figures counted of them, make another run, but change no row.
    listed = pairs.to_pylist() if pairs is not None else None
    run_recipe = fingerprint({"recipe": explainer.recipe, "pairs": listed, "figures": FIGURES})
    variant = explainer.variant(config)
    scope = scope_of(canary)
    with open_session(workspace, JOB, [TABLE], config.cluster, config.lock_lease_s, night, scope) as session:
        reject_limit = RejectLimit(config.max_reject_rate)
        if canary is None:
            session.keep_finished(run_recipe, variant, input_tables(config), [TABLE], reject_limit)
        inputs = session.versions(*input_tables(config))
        if pairs is None:
            explainer.check_lists(workspace)
        base = session.versions(TABLE) if canary is None else {TABLE: ABSENT}
        if scope == WHOLE and session.is_current(run_recipe, inputs):
            return JobResult(JOB, "nothing_to_do", cost=cost_of(Usage(), time.monotonic() - started))
        facts = {
            "variant": variant,
            "model": explainer.adapter.hash,
            "engine": config.engine.engine,
            "recipe": explainer.recipe,
        }
        run = session.run(run_recipe, inputs, base, scope, facts)
        task = explainer.task(config, workspace, {**inputs, **base}, pairs, scope, canary)
        units = [Unit("users", index) for index in range(session.info.buckets)]
        budget = session.budget(config.limits(), run)
        receipts = session.phase(run, units, partial(ExplainBucket, task, budget), JOB, reject_limit, budget)
        parts = bucket_parts(receipts.values(), variant, (TABLE,))
        told = _figures(receipts.values())
        result = users_result(session, run, receipts.values(), parts, config.limits(), started, told, "pairs")
        published = session.publish(run, parts, result)
    if canary is not None:
        say(f"{JOB}: the canary's tables are below {workspace.uri}/canary/{run.run_key}")
    if published.status == "ok":
        params = {"model": explainer.adapter.hash, "variant": variant, "scope": scope[:12]}
        numbers = {name: value for name, value in published.metrics.items() if value is not None}
        tracking.log_run(JOB, run.run_key, params, {**numbers, **published.cost})
    return published


def input_tables(config: ExplainOptions) -> tuple[str, ...]:
    """The tables whose versions a run pins."""
    return ("histories", "items", "rejects", *(["recommendations"] if config.pairs is None else []))


def _figures(receipts: Collection[Receipt]) -> dict[str, float | None]:
    """The share of the new explanations that each fact of `FIGURES` applies to; None if nothing was explained."""
    facts = {name: sum(receipt.facts[name] for receipt in receipts) for name in FIGURES}
    explained = facts["explained"]
    return {f"{name}_share": round(facts[name] / explained, 4) if explained else None for name in FIGURES[1:]}


def read_pairs(config: ExplainOptions, workspace: Workspace, explainer: Explainer) -> pa.Table | None:
    """The file's pairs as user_id and item_index, each once, sorted; None if everybody's top recommendation is meant.

    Raises UsageError for a file that cannot be read or has no pairs, and for users or items that are unknown.
    """
    if config.pairs is None:
        return None
    path, items = config.pairs, explainer.loaded.items
    texts = csv.ConvertOptions(column_types={"user_id": pa.string(), "item_id": pa.string()})
    try:
        rows = csv.read_csv(path, convert_options=texts).select(["user_id", "item_id"])
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise UsageError(
            f"The pairs file {path} cannot be read: {error}.",
            "Write CSV with a header and the columns user_id and item_id.",
        ) from None
    histories = workspace.tables["histories"]
    users = histories.read(histories.version(), ["user_id"])["user_id"]
    place = pc.index_in(rows["item_id"], value_set=items["item_id"])
    for name, known in (("user_id", pc.is_in(rows["user_id"], value_set=users)), ("item_id", pc.is_valid(place))):
        strangers = rows.filter(pc.invert(known))[name].to_pylist()
        if strangers:
            raise UsageError(
                f"{len(strangers):,} of {rows.num_rows:,} pairs of {path} have a {name} that nobody knows here, for example "
                f"{strangers[0]!r}.",
                "Check the file; ids are compared exactly.",
            )
    if not rows.num_rows:
        raise UsageError(f"The pairs file {path} has no pairs.", "Write one user_id and item_id a line.")
    pairs = pa.table({"user_id": rows["user_id"], "item_index": items["index"].take(place)})
    order = [("user_id", "ascending"), ("item_index", "ascending")]
    return pairs.group_by(["user_id", "item_index"]).aggregate([]).sort_by(order)
