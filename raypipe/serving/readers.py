"""The adapters of a release as requests need them: which there are, and how each puts what it reads to the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import UsageError
from raypipe.language.adapters import read_card
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.releases import Release
from raypipe.systems.recexplainer import ExplainerConfig, RecExplainer
from raypipe.systems.recinterpreter import InterpreterConfig, RecInterpreter

EXPLAINER, INTERPRETER = "recexplainer", "recinterpreter"


@dataclass(frozen=True)
class Reader:
    """An adapter of a release, NAME/HASH, and the system it was trained by."""

    adapter: str
    system: RecExplainer | RecInterpreter

    @property
    def name(self) -> str:
        return self.adapter.partition("/")[0]

    @property
    def kind(self) -> str:
        return EXPLAINER if isinstance(self.system, RecExplainer) else INTERPRETER


def read_readers(models: Models, release: Release, cache: Path) -> Mapping[str, Reader]:
    """The release's adapters, by name.

    Raises UsageError for files that are not those that were stored, and for an adapter of another recommender.
    """
    readers = {}
    for name, content in sorted(release.adapters.items()):
        model = find_model(models, f"{name}/{content}")
        card = read_card(models.fetch_unharmed(model, cache))
        if card.recommender != release.recommender:
            raise UsageError(
                f"The adapter {name} was trained beside {card.recommender}, and the release has {release.recommender}.",
                "Put a release in force whose parts belong together: `raypipe release` checks that.",
            )
        system = _system(model)
        if system is not None:
            readers[name] = Reader(f"{model.name}/{model.hash}", system)
    return readers


def of_kind(readers: Mapping[str, Reader], kind: str) -> Sequence[Reader]:
    return [reader for reader in readers.values() if reader.kind == kind]


def _system(model: Model) -> RecExplainer | RecInterpreter | None:
    """None for a system that answers no requests."""
    options = model.lineage.get("options")
    if model.lineage.get("system") == EXPLAINER:
        return ExplainerConfig.model_validate(options).build()
    if model.lineage.get("system") == INTERPRETER:
        return InterpreterConfig.model_validate(options).build()
    return None
