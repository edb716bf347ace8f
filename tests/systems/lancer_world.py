"""A planted structure that LANCER learns, and how a test trains and asks it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from raypipe.language.adapters import AdapterCard
from raypipe.language.backbone import load_backbone
from raypipe.language.catalogue import Catalogue
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.language.prefixes import PREFIX
from raypipe.recommenders.evaluation import HeldOut
from raypipe.recommenders.windows import Histories
from raypipe.systems.lancer import NAME, LancerConfig
from raypipe.systems.lancer_examples import LancerTrainingData, prepare_lancer
from raypipe.systems.lancer_figures import EvaluationSet, measured
from raypipe.systems.lancer_lists import ListWriter, load_writer
from raypipe.systems.lancer_training import LancerTask, store_vectors

ITEMS, USERS, EVENTS = 12, 60, 10
WIDTH = 64
SMALL = {
    "reads": 4,
    "shown": 1,
    "virtual_tokens": 6,
    "learnt": 1,
    "residual": True,
    "text_characters": 0,
    "filter_seen": False,
    "prompts": {"line": "{title}", "perturbed": ()},
}


def catalogue() -> Catalogue:
    return Catalogue([f"Film {n}" for n in range(1, ITEMS + 1)], [{}] * ITEMS)


def histories() -> Histories:
    """Everybody goes round through four films of their own: what comes next was chosen four events ago, and the last event
    alone tells nothing of it."""
    rng = np.random.default_rng(0)
    rounds = [np.tile(rng.permutation(ITEMS)[:4] + 1, EVENTS)[:EVENTS] for _ in range(USERS)]
    return Histories(np.concatenate(rounds).astype(np.int32), np.arange(1, USERS + 1) * EVENTS)


def config_of(**options: object) -> LancerConfig:
    return LancerConfig.model_validate({**SMALL, **options})


@dataclass
class Prepared:
    folder: Path
    lm: Path
    config: LancerConfig
    catalogue: Catalogue

    def task(self, stage: str = "second", positions: int = 1000) -> LancerTask:
        return LancerTask(self.folder, stage, positions, 1000)  # type: ignore[arg-type]

    def trained(
        self, steps: int, stage: str = "second", lr: float = 0.005, batch: int = 24
    ) -> tuple[nn.Module, list[float]]:
        """By the plainest loop; the first stage's prompts and the second's adapter are stored."""
        torch.manual_seed(0)
        task = self.task(stage)
        model = task.build().train()
        optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
        losses = []
        for step in range(steps):
            loss = model(task.batch(step, 0, 0, 1, batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        kept = {name: weight.detach() for name, weight in model.named_parameters() if task.keeps(name)}
        task.save(kept, self.folder if stage == "first" else self.adapter)
        return model.eval(), losses

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def writer(self, answer_tokens: int) -> ListWriter:
        return load_writer(self.config, self.catalogue, str(self.lm), self.adapter, answer_tokens, "cpu")

    def figures(self) -> dict[str, float]:
        """Asked for everybody's last event."""
        held = HeldOut.of(histories(), 1, ITEMS)
        evaluated = EvaluationSet(held, np.zeros(USERS, bool))
        told = measured(evaluated, self.writer(8), lambda name, done, of: None)
        return {
            figure if name == NAME else f"{name}: {figure}": mean.value
            for name, figures in told.items()
            for figure, mean in figures.items()
        }


def prepared(lm: Path, folder: Path, told: Catalogue | None = None, validated: int = 0, **options: object) -> Prepared:
    config, shown = config_of(**options), told or catalogue()
    backbone = load_backbone(str(lm), device="cpu")
    card = AdapterCard(config.adapter, {PREFIX: WIDTH} if config.reasoning else {}, checkpoint_hash(lm), "")
    texts = LancerTrainingData(config.lines(shown), config.contents(shown), histories().without_last(1), validated)
    prepare_lancer(folder, texts, backbone, str(lm), card, config, seed=0)
    if config.reads_once:
        store_vectors(folder)
    return Prepared(folder, lm, config, shown)
