"""Training of LANCER in two stages (arXiv 2309.10435, section 4.3), and its validation.

The first stage trains the prompts alone while both models stay frozen: on contents of items under the knowledge prompt,
and on histories under the reasoning prompt. The second stage trains the writer too, on histories. Both stages read the
folder that `prepare_lancer` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from raypipe.language.adapters import build_adapter, save_adapter
from raypipe.language.backbone import load_backbone
from raypipe.language.prefixes import PREFIX
from raypipe.language.soft_prompts import SoftPromptLm
from raypipe.systems.lancer import LancerConfig
from raypipe.systems.lancer_examples import FIRST, VECTORS, LancerExamples
from raypipe.systems.lancer_reading import padded, read_items, represent

Stage = Literal["first", "second"]
_VALIDATED_AT_ONCE = 32
_SHOWN = 4  # examples that are described of a batch whose loss is not a number
_CHARACTERS = 200


def store_vectors(folder: Path) -> None:
    """Write the item representations at the beginning of the second stage into the folder that it trains from."""
    told = LancerExamples(folder, 1)
    backbone = load_backbone(told.lm, device="cpu")
    reader = load_backbone(told.lm, device="cpu").model
    prefix = build_adapter(backbone, told.card, told.seed).prefix
    if prefix is not None and (folder / FIRST).is_file():
        weights = {name.removeprefix("prefix."): weight for name, weight in load_file(folder / FIRST).items()}
        prefix.load_state_dict(weights, strict=False)
    vectors = read_items(reader, prefix, told.contents(), told.config.representation, told.end)
    np.save(folder / VECTORS, vectors)


class LancerLm(nn.Module):
    """The writer with the prompts, and the reader if items are read in training; `forward` returns a step's loss."""

    def __init__(self, adapted: SoftPromptLm, reader: Any, config: LancerConfig, pad: int) -> None:
        super().__init__()
        self.adapted, self.reader, self.config, self.pad = adapted, reader, config, pad

    def train(self, mode: bool = True) -> LancerLm:
        """Set the mode of the writer and prompts; the reader stays in eval mode, dropout off."""
        super().train(mode)
        if self.reader is not None:
            self.reader.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum of the losses of histories and of contents, whichever the batch holds.

        Histories are `tokens`, `mask`, `labels` and `prefix/known`. Their items are represented by `prefix/vectors`;
        otherwise `prefix/rows` [batch, count] are rows of `items/tokens`, which are read here. Contents are
        `contents/tokens` and `contents/mask`.
        """
        losses = []
        if "tokens" in batch:
            losses.append(self.adapted(self.with_vectors(batch)))
        if "contents/tokens" in batch:
            losses.append(self._content_loss(batch))
        return torch.stack(losses).sum()

    def with_vectors(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if "items/tokens" not in batch:
            return batch
        vectors = represent(
            self.reader or self.adapted.lm,
            self.adapted.prefix,
            batch["items/tokens"],
            batch["items/mask"],
            self.config.representation,
            self.pad,
        )
        return {**batch, f"{PREFIX}/vectors": vectors[batch[f"{PREFIX}/rows"]]}

    def _content_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy summed over all tokens of contents but the first of each, divided by `contents/count`."""
        lm: Any = self.reader or self.adapted.lm
        tokens, mask = batch["contents/tokens"], batch["contents/mask"]
        states = represent(lm, self.adapted.prefix, tokens, mask, "all", self.pad)
        wanted = mask[:, 1:] == 1
        logits = lm.get_output_embeddings()(states[:, :-1][wanted])
        total = functional.cross_entropy(logits.float(), tokens[:, 1:][wanted], reduction="sum")
        return total / batch["contents/count"]


class LancerTask:
    """The training task of one stage; implements `ValidatedTask`. It is picklable and reads its files where it runs."""

    def __init__(self, folder: Path, stage: Stage, positions: int, asked: int) -> None:
        """An epoch learns at most the last `positions` stretches of each history; at most `asked` users validate."""
        self.folder, self.stage, self.positions, self.asked = Path(folder), stage, positions, asked
        self.examples = LancerExamples(self.folder, positions)
        self.config, self.card = self.examples.config, self.examples.card

    def __reduce__(self) -> tuple[type[LancerTask], tuple[Path, Stage, int, int]]:
        return type(self), (self.folder, self.stage, self.positions, self.asked)

    @property
    def learns_histories(self) -> bool:
        return self.stage == "second" or self.config.first_stage == "both"

    def build(self) -> nn.Module:
        """The model of the stage. The second stage starts from the prompts of the first, if there was one."""
        backbone = load_backbone(self.examples.lm, device="cpu")
        self._tokenizer = backbone
        adapted = build_adapter(backbone, self.card, self.examples.seed)
        self._kept = {f"adapted.{name}" for name, weight in adapted.named_parameters() if weight.requires_grad}
        if self.stage == "first":
            adapted.lm.requires_grad_(False)
            self._kept = {name for name in self._kept if name.startswith("adapted.prefix.")}
            if not self.learns_histories and adapted.prefix is not None:
                for name, weight in adapted.prefix.named_parameters():
                    weight.requires_grad_(name.startswith("knowledge."))
            return LancerLm(adapted, None, self.config, self.examples.end)
        if (self.folder / FIRST).is_file():
            adapted.load_state_dict(load_file(self.folder / FIRST), strict=False)
        reader = None
        if self.config.reasoning and not self._read_once:
            reader = load_backbone(self.examples.lm, device="cpu").model.requires_grad_(False).eval()
        if self.config.second_stage == "frozen" and self.config.knowledge:
            # The knowledge prompt that items were read under must not change any more, nor its keys and values.
            assert adapted.prefix is not None
            adapted.prefix.knowledge.requires_grad_(False)
        return LancerLm(adapted, reader, self.config, self.examples.end)

    def keeps(self, name: str) -> bool:
        return name in self._kept

    def steps_per_epoch(self, batch_size: int) -> int:
        if self.stage == "first":
            return max(1, self.examples.items // batch_size)
        return max(1, self.examples.count // batch_size)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        """This rank's share of the global batch of `step`: a function of the arguments alone.

        `count` and `contents/count` are the learnt tokens of all ranks, divided by the number of ranks.
        """
        found: dict[str, Tensor] = {}
        if self.learns_histories:
            whole = self.examples.drawn(step, seed, batch_size)
            drawn = np.random.default_rng((seed, step, 5)).integers(len(self.examples.frames), size=len(whole))
            found = self.examples.histories(whole[rank::world], read_once=self._read_once, frames=drawn[rank::world])
            learnt = sum(self.examples.learnt_tokens(stretch) for stretch in whole)
            found["count"] = torch.tensor(learnt / world)
        if self.stage == "first" and self.config.knowledge:
            epoch, index = divmod(step, self.steps_per_epoch(batch_size))
            order = np.random.default_rng((seed, epoch, 3)).permutation(self.examples.items) + 1
            whole = order[index * batch_size : (index + 1) * batch_size]
            contents = [self.examples.content(int(item)) for item in whole]
            found |= padded(contents[rank::world], "contents")
            found["contents/count"] = torch.tensor(max(1, sum(len(content) - 1 for content in contents)) / world)
        return found

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        named = {name.removeprefix("adapted."): weight for name, weight in weights.items()}
        if self.stage == "second":
            save_adapter(folder, self.card, named)
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in named.items()}, folder / FIRST)

    @torch.no_grad()
    def validate(self, module: nn.Module, rank: int, world: int) -> tuple[float, float]:
        """Sum of log-likelihoods over this rank's share of users, and their number.

        The likelihood is that of the line of the first event after those that are learnt.
        """
        assert isinstance(module, LancerLm)
        there = np.flatnonzero(self.examples.lengths > self.examples.validated)
        rows = np.sort(np.random.default_rng(0).permutation(there)[: self.asked])[rank::world]
        total = 0.0
        for start in range(0, len(rows), _VALIDATED_AT_ONCE):
            part = rows[start : start + _VALIDATED_AT_ONCE]
            firsts = self.examples.lengths[part] - self.examples.validated
            stretches = np.stack([part, firsts, np.ones_like(part)], 1)
            batch = self.examples.histories(stretches, read_once=self._read_once)
            batch["count"] = torch.tensor(1.0)
            device = next(module.parameters()).device
            total -= float(module.adapted(module.with_vectors({k: v.to(device) for k, v in batch.items()})))
        return total, float(len(rows))

    def describe(self, step: int, seed: int, batch_size: int) -> str:
        """The beginnings of the batch's texts."""
        batch = self.batch(step, seed, 0, 1, batch_size)
        tokens = batch["tokens"] if "tokens" in batch else batch["contents/tokens"]
        texts = self._tokenizer.decode(tokens[:_SHOWN].tolist())
        return "; ".join(repr(text[:_CHARACTERS]) for text in texts)

    @property
    def _read_once(self) -> bool:
        return self.stage == "second" and self.config.reads_once
