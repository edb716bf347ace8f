"""Lists of recommendations that LANCER writes: histories in, items of the catalogue out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.engines.engine import EngineConfig, Outcome
from raypipe.engines.transformers import TransformersEngine
from raypipe.errors import UsageError
from raypipe.language.catalogue import Catalogue
from raypipe.language.grounding import Grounding
from raypipe.systems.lancer import Frame, Lancer, LancerConfig, lists_of
from raypipe.systems.lancer_reading import read_items

_USERS_AT_ONCE = 128


@dataclass(frozen=True)
class Lists:
    """The lists of users.

    Per user: `items`, best first; `logprobs`, the log-probability of the first line that was grounded to each item;
    `exact` and `margins` of grounding all answers (see `Grounded`); and the engine's outcome.
    """

    items: list[list[int]]
    logprobs: list[list[float]]
    exact: list[NDArray[np.bool_]]
    margins: list[NDArray[np.float32]]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class ListWriter:
    """Asks `engine` for lines of at most `answer_tokens` tokens and grounds what it writes."""

    lancer: Lancer
    grounding: Grounding
    engine: TransformersEngine
    answer_tokens: int

    def lists(
        self,
        histories: Sequence[Sequence[int]],
        read: Sequence[Sequence[int]] | None = None,
        frame: Frame | None = None,
        *,
        filter_seen: bool | None = None,
        targets: Sequence[int] | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> Lists:
        """The lists of the users with these histories (item indices in time order, at least one each).

        The reasoning prompts are made of the items in `read`, by default of `histories`. `filter_seen` defaults to that
        of the configuration. `targets`, one item per user, stay in the lists even if seen, because a list that may not
        hold the target cannot be measured. `tell` is called with the number of users done and of all users.
        """
        filter_seen = self.lancer.config.filter_seen if filter_seen is None else filter_seen
        read = histories if read is None else read
        found = Lists([], [], [], [], [])
        for start in range(0, len(histories), _USERS_AT_ONCE):
            part = slice(start, start + _USERS_AT_ONCE)
            prompts = self.lancer.prompts(histories[part], read[part], frame)
            outcomes = self.lancer.answers(self.engine, prompts, self.answer_tokens)
            answers = [outcome.beams for outcome in outcomes]
            grounded = self.grounding.ground([beam.text for mine in answers for beam in mine])
            ends = np.cumsum([len(mine) for mine in answers])[:-1]
            items = np.split(grounded.nearest + 1, ends)
            seen = histories[part]
            if targets is not None:
                pairs = zip(seen, targets[part], strict=True)
                seen = [[item for item in mine if item != target] for mine, target in pairs]
            for mine, beams in zip(lists_of(items, seen, filter_seen=filter_seen), answers, strict=True):
                found.items.append(list(mine))
                found.logprobs.append([beams[place].logprob for place in mine.values()])
            found.exact.extend(np.split(grounded.exact, ends))
            found.margins.extend(np.split(grounded.margin, ends))
            found.outcomes.extend(outcomes)
            if tell is not None:
                tell(min(part.stop, len(histories)), len(histories))
        return found


def stored_config(name: str, lineage: Mapping[str, Any]) -> LancerConfig:
    """The configuration of a stored adapter. Raises UsageError if it was trained with options that no longer exist."""
    try:
        return LancerConfig.model_validate(lineage["options"])
    except ValueError as error:
        raise UsageError(f"The adapter {name} cannot be asked: {error}", "Align it again.") from None


def build_writer(
    config: LancerConfig,
    catalogue: Catalogue,
    base: TransformersEngine,
    engine: TransformersEngine,
    answer_tokens: int,
) -> ListWriter:
    """The list writer of a stored adapter.

    `engine` has the adapter; `base` is the same language model without it, and reads the items. The catalogue may
    differ from the one that the adapter was trained on: its items are read anew.
    """
    adapted, reader = engine.adapted, base.backbone
    assert adapted is not None, "what writes items has an adapter"
    vectors = None
    if config.reasoning:
        contents = [
            ids[: config.content_tokens]
            for ids, _ in reader.encode_pieces([[text] for text in config.contents(catalogue)])
        ]
        vectors = read_items(reader.model, adapted.prefix, contents, config.representation, reader.ends[0])
    lines = config.lines(catalogue)
    lancer = Lancer(config, lines, vectors, reader, engine.context - answer_tokens - config.room)
    return ListWriter(lancer, Grounding(engine.backbone, lines), engine, answer_tokens)


def load_writer(
    options: LancerConfig, catalogue: Catalogue, lm: str, adapter: Path, answer_tokens: int, device: str = "auto"
) -> ListWriter:
    """The list writer of the language model and the adapter in these folders."""
    base = TransformersEngine(EngineConfig(lm=lm, device=device))
    return build_writer(options, catalogue, base, base.beside(adapter), answer_tokens)
