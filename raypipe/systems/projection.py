"""Measuring what projection loses, by probes.

The same probe reads a recommender's states, the tokens made of them, and the language model's hidden states of a prompt
with these tokens. Each probe learns from users who are not held out and is asked about those who are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.language.adapters import AdapterCard
from raypipe.language.backbone import Backbone
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import SoftPromptLm, collate, encode
from raypipe.systems.probes import CONTROL, LabelledVectors, ProbeConfig, probe_figures

_PROMPTS_AT_ONCE = 64
_ENCODED_AT_ONCE = 4096  # encoding the prompts of all users and places at once would fill gigabytes


@dataclass(frozen=True)
class AdaptedLm:
    """A language model with its adapter, and the adapter's card."""

    backbone: Backbone
    model: SoftPromptLm
    card: AdapterCard

    def tokens(self, vectors: Sequence[Vectors]) -> NDArray[np.float32]:
        """The mean of the tokens that the model reads for each of `vectors`: float32 [n, hidden]."""
        return self._over([Prompt.of(mine) for mine in vectors], self._mean_token)

    def hidden_states(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """The last layer's state at the end of each prompt: float32 [prompts, hidden]."""
        return self._over(prompts, self._last_state)

    def _mean_token(self, batch: Mapping[str, Tensor]) -> Tensor:
        read = batch["mask"][:, :, None]
        return (self.model.embed(batch) * read).sum(1) / read.sum(1)

    def _last_state(self, batch: Mapping[str, Tensor]) -> Tensor:
        positions = (batch["mask"].cumsum(1) - 1).clamp(min=0)
        return self.model.lm.get_decoder()(
            inputs_embeds=self.model.embed(batch),
            attention_mask=batch["mask"],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, -1]

    @torch.inference_mode()
    def _over(
        self, prompts: Sequence[Prompt], function: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> NDArray[np.float32]:
        config, widths, device = self.card.config.projectors, self.card.widths, self.model.lm.device
        found = []
        for first in range(0, len(prompts), _ENCODED_AT_ONCE):
            encoded = [
                encode(self.backbone, prompt, config, widths) for prompt in prompts[first : first + _ENCODED_AT_ONCE]
            ]
            order = np.argsort([len(one.ids) for one in encoded], kind="stable")
            made = []
            for start in range(0, len(order), _PROMPTS_AT_ONCE):
                batch = collate([encoded[row] for row in order[start : start + _PROMPTS_AT_ONCE]], left=True)
                made.append(function({name: tensor.to(device) for name, tensor in batch.items()}).float().cpu())
            found.append(torch.cat(made).numpy()[np.argsort(order)])
        return np.concatenate(found)


def probed(
    learnt: Mapping[str, LabelledVectors],
    asked: Mapping[str, LabelledVectors],
    items: int,
    named: Mapping[str, str],
) -> dict[str, float]:
    """For each kind of vectors, train a probe on `learnt` and return its figures on `asked`, as `probe of KIND: NAME`.

    The control's figures have its name before NAME. `named` maps the figures of `probe_figures` to their NAMEs.
    """
    found: dict[str, float] = {}
    for kind, rows in learnt.items():
        figures = probe_figures(ProbeConfig().fit(rows, items), asked[kind])
        for figure, name in named.items():
            found[f"probe of {kind}: {name}"] = round(figures[figure].value, 4)
            found[f"probe of {kind}: {CONTROL}: {name}"] = round(figures[f"{CONTROL}: {figure}"].value, 4)
    return found
