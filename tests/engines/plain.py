"""What an engine's shortcuts are measured against: one answer after one prompt, read at once, in float64, without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raypipe.language.backbone import Backbone, load_backbone


class Plain:
    """A model in float64. `logprobs` [tokens, vocabulary] tell what comes after a prompt and each of the tokens read."""

    def __init__(self, lm: str) -> None:
        self.backbone: Backbone = load_backbone(lm, device="cpu")
        self.backbone.model.double()

    @torch.inference_mode()
    def next_logprobs(self, prompt: Sequence[int], answer: Sequence[int] = ()) -> Tensor:
        """After the prompt and after each token of the answer, [answer + 1, vocabulary]."""
        logits = self.backbone.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
        return torch.log_softmax(logits, -1)

    def logprob(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        """Of the answer, token by token, its last included."""
        told = self.next_logprobs(prompt, answer[:-1])
        return float(sum(told[place, token] for place, token in enumerate(answer)))
