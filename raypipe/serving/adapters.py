"""The adapters of a release, each with the system that makes its prompts for the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from raypipe.errors import UsageError
from raypipe.language.adapters import read_card
from raypipe.language.backbone import load_tokenizer, read_context
from raypipe.language.catalogue import Catalogue
from raypipe.recommenders.windows import Histories
from raypipe.serving.config import OF_RELEASE, ServiceConfig
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.releases import Release
from raypipe.systems.candidate_facts import Facts
from raypipe.systems.lancer import LancerConfig
from raypipe.systems.lancer_lists import stored_config
from raypipe.systems.recexplainer import ExplainerConfig, RecExplainer
from raypipe.systems.recinterpreter import InterpreterConfig, RecInterpreter
from raypipe.systems.trsr import Trsr, TrsrConfig, shown_summaries
from raypipe.systems.trsr_past import Past

EXPLAINER, INTERPRETER, RANKER, WRITER = "recexplainer", "recinterpreter", "trsr", "lancer"


@dataclass(frozen=True)
class Ranker:
    """An LLM-TRSR that is stored in `folder` and asks in the words of `catalogue`.

    Its tokenizer is that of the language model `lm`, which may read `context` tokens, None for all it can. `summaries`
    is the paradigm of the summaries it is shown, None for none.
    """

    options: TrsrConfig
    summaries: str | None
    folder: Path
    lm: str
    context: int | None
    catalogue: Catalogue

    @cached_property
    def trsr(self) -> Trsr:
        """The system, with no users yet.

        Raises UsageError if the language model cannot be read, and ValueError if the system cannot be asked with it.
        """
        most = read_context(self.lm)
        facts = Facts.load(self.folder, len(self.catalogue.titles)) if self.options.facts else None
        nobody = Past(Histories(np.zeros(0, np.int32), np.zeros(0, np.int64)), np.zeros(0, bool), self.catalogue)
        return Trsr(self.options, nobody, load_tokenizer(self.lm), min(self.context or most, most), facts)


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter of a release: its `model` NAME/HASH, and the system that trained it."""

    model: str
    system: RecExplainer | RecInterpreter | Ranker | LancerConfig

    @property
    def name(self) -> str:
        return self.model.partition("/")[0]

    @property
    def kind(self) -> str:
        if isinstance(self.system, Ranker):
            return RANKER
        if isinstance(self.system, LancerConfig):
            return WRITER
        return EXPLAINER if isinstance(self.system, RecExplainer) else INTERPRETER


def load_adapters(
    models: Models, release: Release, config: ServiceConfig, catalogue: Catalogue
) -> Mapping[str, ServedAdapter]:
    """The release's adapters, by name.

    Raises UsageError if files are not those that were stored, or an adapter belongs to another recommender.
    """
    adapters, cache = {}, Path(config.model_cache)
    for name, content in sorted(release.adapters.items()):
        model = find_model(models, f"{name}/{content}")
        folder = models.fetch_unharmed(model, cache)
        card = read_card(folder)
        # Adapters that rank or write items read words only, and belong to no recommender.
        if card.recommender not in {"", release.recommender}:
            raise UsageError(
                f"The adapter {name} was trained beside {card.recommender}, and the release has {release.recommender}.",
                "Put a release in force whose parts belong together: `raypipe release` checks that.",
            )
        system = _system(model) or _ranker(models, model, folder, release, config, catalogue)
        if system is not None:
            adapters[name] = ServedAdapter(f"{model.name}/{model.hash}", system)
    return adapters


def lm_of(models: Models, lm: str, cache: Path) -> str:
    """The folder of a release's language model if the workspace has it, else its hub name."""
    stored = [model for model in models.all("lm") if model.hash == lm]
    return str(models.fetch_unharmed(stored[0], cache)) if stored else lm


def adapters_of_kind(adapters: Mapping[str, ServedAdapter], kind: str) -> Sequence[ServedAdapter]:
    return [adapter for adapter in adapters.values() if adapter.kind == kind]


def _system(model: Model) -> RecExplainer | RecInterpreter | LancerConfig | None:
    """The system that trained an adapter; None for a ranker, and for systems that answer no requests."""
    options = model.lineage.get("options")
    if model.lineage.get("system") == EXPLAINER:
        return ExplainerConfig.model_validate(options).build()
    if model.lineage.get("system") == INTERPRETER:
        return InterpreterConfig.model_validate(options).build()
    if model.lineage.get("system") == WRITER:
        return stored_config(model.name, model.lineage)
    return None


def _ranker(
    models: Models, model: Model, folder: Path, release: Release, config: ServiceConfig, catalogue: Catalogue
) -> Ranker | None:
    """The ranker of an adapter; None if another system trained it."""
    if model.lineage.get("system") != RANKER:
        return None
    engine, options = config.language.engine, TrsrConfig.model_validate(model.lineage["options"]).undisturbed()
    lm = engine.lm if engine.lm != OF_RELEASE else lm_of(models, release.lm, Path(config.model_cache))
    summaries = shown_summaries(config.language.ranking, model.lineage)
    ranker = Ranker(options, summaries, folder, lm, engine.context, catalogue)
    if config.language.replicas:
        try:
            _ = ranker.trsr
        except ValueError as error:
            raise UsageError(f"The adapter {model.name} cannot be asked: {error}", "Align it again.") from None
    return ranker
