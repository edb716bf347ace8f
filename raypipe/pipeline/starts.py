"""What a recommender's training starts from that is not drawn: another model's item vectors, and attribute scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.pipeline.held_out import Cut
from raypipe.pipeline.loaded import Loaded
from raypipe.recommenders.attribute_scores import load_scores
from raypipe.recommenders.checkpoint import check_catalogue
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.guided import Start, fuse
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import ModelCache
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.workspace import Workspace


def resolved(config: RecommenderConfig, workspace: Workspace) -> RecommenderConfig:
    """The config with the content hashes of the models that training starts from, which makes them part of the recipe.

    Raises UsageError if one is not there.
    """
    models = Models(workspace.store)

    def named(name: str | None, fits: Callable[[Model], bool] = lambda model: True) -> str | None:
        if name is None:
            return None
        model = find_model(models, name, fits)
        return f"{model.name}/{model.hash}"

    if config.model == "dreamrec":
        options = config.dreamrec.model_copy(update={"table": named(config.dreamrec.table)})
        return config.model_copy(update={"dreamrec": options})
    guided = {"scores": named(config.guided.scores), "base": named(config.guided.base, _is_plain)}
    return config.model_copy(update={"guided": config.guided.model_copy(update=guided)})


def _is_plain(model: Model) -> bool:
    """Whether a model started from no other model, so that a retrained guided recommender is not based on itself."""
    guided = model.lineage["config"]["recommender"]["guided"]
    return guided["scores"] is None and guided["base"] is None


def start_of(
    config: ModelCache,
    workspace: Workspace,
    recommender: RecommenderConfig,
    seen: Histories,
    cut: Cut,
    items: Sequence[str],
    seed: int,
) -> Start:
    """What `recommender` starts from over the catalogue `items`.

    Its training sees the histories `seen` and holds out `cut`. Raises UsageError for models that do not fit, or that
    have read what is held out.
    """
    if recommender.model == "dreamrec":
        return Start(_oracle_table(config, workspace, recommender, cut, len(items)))
    options = recommender.guided
    trained = seen.counts(len(items)) > 0
    base: NDArray[np.float32] | None = None
    if options.base is not None:
        loaded = Loaded.of(config, workspace, options.base)
        cut.check(loaded.model)
        base = _over_all(loaded.recommender.item_states().detach().numpy(), len(items))
    if options.scores is None:
        return fuse(None, options, recommender.width, base, trained, seed)
    models = Models(workspace.store)
    model = find_model(models, options.scores)
    scores = load_scores(config.fetch(workspace, model), models.users(model))
    check_catalogue(scores.catalogue, items, options.scores)
    cut.check(model)
    return fuse(scores, options, recommender.width, base, trained, seed)


def _oracle_table(
    config: ModelCache, workspace: Workspace, recommender: RecommenderConfig, cut: Cut, items: int
) -> NDArray[np.float32] | None:
    """The item vectors of the model that `dreamrec.table` names; None if it names none.

    They are scaled to a mean length of √width. Raises UsageError if the widths differ.
    """
    named = recommender.dreamrec.table
    if named is None:
        return None
    loaded = Loaded.of(config, workspace, named)
    cut.check(loaded.model)
    trained = loaded.recommender
    if trained.width != recommender.width:
        raise UsageError(
            f"The item vectors of {named} are {trained.width} wide and dreamrec's {recommender.width}.",
            "Give both the same --recommender.width.",
        )
    table = trained.item_states().detach()
    # Noise has a length of √width, and the vectors start at its scale.
    scale = table.shape[1] ** 0.5 / table[1:].norm(dim=1).mean()
    return _over_all((table * scale).numpy(), items)


def _over_all(vectors: NDArray[np.float32], items: int) -> NDArray[np.float32]:
    """A model's item vectors [items it knows + 1, width], extended to the catalogue: [items + 1, width].

    Items that came after the model start at the mean of the items it knows.
    """
    table = np.empty((items + 1, vectors.shape[1]), np.float32)
    table[: len(vectors)] = vectors
    table[len(vectors) :] = vectors[1:].mean(0)
    return table
