"""DreamRec: diffusion generates the next item's vector, guided by the history (Yang et al., NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from raypipe.config import WRITTEN, Config, shaping
from raypipe.recommenders.attention import Transformer
from raypipe.recommenders.losses import LossConfig
from raypipe.recommenders.noise import seeded_normal
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sequences import Sequences

Schedule = Literal["exp", "cosine", "linear"]
_NORMALISED_START = 0.05


def noise_schedule(kind: Schedule, steps: int) -> Tensor:
    """β_1…β_T, float64 [steps].

    `linear` is 1e−4…0.02 scaled to `steps` (Ho et al. 2020). `cosine` is that of Nichol & Dhariwal (2021, eq. 17). In
    `exp` the variance falls exponentially, β_t = 1 − exp(−(β_min + (β_max − β_min)(2t − 1)/(2T))/T) with β_min = 0.1
    and β_max = 10.
    """
    at = torch.arange(1, steps + 1, dtype=torch.float64)
    if kind == "linear":
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64).clamp(max=0.999)
    if kind == "cosine":
        level = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return 1 - torch.exp(-0.1 / steps - (10 - 0.1) * (2 * at - 1) / (2 * steps**2))


class DreamRecOptions(Config):
    steps: int = shaping(500, "T of the diffusion", ge=1)
    schedule: Schedule = shaping("linear", "of the noise")
    unguided: float = shaping(0.1, "share of positions trained without their history", ge=0, le=1)
    guidance: float = shaping(2.0, "w of classifier-free guidance", ge=0)
    sampling_steps: int | None = shaping(
        None, "unset: all T; fewer are faster; 1 gives the mean of what the history makes likely", ge=1
    )
    denoiser_layers: Annotated[Literal[1, 2], WRITTEN] = shaping(
        1, "one linear layer, as published; two with a GELU between"
    )
    normalised: bool = shaping(False, "item vectors at the length of noise, against collapse")
    rounding: float = shaping(
        0.0,
        "weight of the loss of telling the next item from a generated vector, against collapse; as published: 0",
        ge=0,
    )
    table: str | None = shaping(None, "NAME or NAME/HASH of a model of the workspace that gives the item vectors")
    frozen_table: bool = shaping(False, "item vectors stay as they start")

    @model_validator(mode="after")
    def _no_more_than_all_steps(self) -> DreamRecOptions:
        if self.sampling_steps is not None and self.sampling_steps > self.steps:
            raise ValueError(f"sampling_steps is {self.sampling_steps}, more than the {self.steps} steps there are")
        return self


class DreamRec(Recommender):
    """States are guidance vectors. `score` generates each one's oracle item, and ranks by the inner product with it."""

    queries_are_items: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    def __init__(
        self,
        items: int,
        width: int,
        max_length: int,
        loss: LossConfig,
        transformer: Transformer,
        options: DreamRecOptions,
    ) -> None:
        super().__init__(items, width, max_length, loss)
        self.guidance, self.unguided, self.normalised = options.guidance, options.unguided, options.normalised
        self.rounding = options.rounding
        self.steps, self.sampling_steps = options.steps, options.sampling_steps or options.steps
        # In a normalised table only directions count, and long vectors hardly turn at a recommender's learning rate. On
        # MovieLens 1M four epochs reach a validation NDCG@10 of .021 from a standard deviation of 1, of .054 from this
        # one.
        nn.init.normal_(self.table, std=_NORMALISED_START if options.normalised else 1.0)
        with torch.no_grad():
            self.table[0] = 0
        self.table.requires_grad_(not options.frozen_table)
        self.transformer = transformer
        self.nobody = nn.Parameter(torch.randn(width))  # guidance of no history
        self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.denoiser: nn.Module = nn.Linear(3 * width, width)
        if options.denoiser_layers == 2:
            self.denoiser = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        kept = (1 - noise_schedule(options.schedule, options.steps)).cumprod(0)
        self.kept: Tensor
        self.register_buffer("kept", torch.cat([torch.ones(1, dtype=torch.float64), kept]))  # ᾱ_0…ᾱ_T

    def item_states(self) -> Tensor:
        """The table [items + 1, width]; if `normalised`, its rows scaled to length √width, the length of noise."""
        if not self.normalised:
            return self.table
        return functional.normalize(self.table, dim=1) * self.width**0.5

    def encode_all(self, sequences: Sequences) -> Tensor:
        return self.transformer(functional.embedding(sequences.items, self.item_states()), sequences)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error of the denoised target vector at a uniform time (eq. 9), over all positions and widths.

        Squared error alone is least if all item vectors are the same. `rounding` adds what Diffusion-LM adds when it
        learns its vectors too (Li et al., NeurIPS 2022, eq. 2): the next-item loss of a denoised vector, so that items
        must be told apart. Here that vector is made of pure noise, as noise that shows the target teaches nothing about
        the history.
        """
        guidance = self.encode_all(Sequences(batch["items"], batch["lengths"]))
        alone = torch.rand(len(guidance), 1, device=guidance.device) < self.unguided
        guidance = torch.where(alone, self.nobody, guidance)
        clean = self.item_states()[batch["targets"]]
        times = torch.randint(1, self.steps + 1, (len(clean),), device=clean.device)
        kept = self.kept[times, None]
        noisy = kept.sqrt().to(clean.dtype) * clean + (1 - kept).sqrt().to(clean.dtype) * torch.randn_like(clean)
        error = functional.mse_loss(self._denoised(noisy, guidance, times), clean, reduction="sum")
        loss = error / (batch["count"] * self.width)
        if self.rounding:
            made = self._denoised(torch.randn_like(clean), guidance, torch.full_like(times, self.steps))
            loss = loss + self.rounding * self.next_item_loss(made, batch["targets"], batch)
        return loss

    @torch.no_grad()
    def oracle(self, states: Tensor, seeds: Tensor) -> Tensor:
        """The generated item vector of each state, [batch, width]; seeds int64 [batch], one per user.

        It takes all `steps` of DDPM (algorithm 2), or if `sampling_steps` is smaller, as many evenly spaced ones, with
        the posterior over the steps between them.
        """
        times = torch.linspace(self.steps, 1, self.sampling_steps, dtype=torch.float64).round().long().tolist()
        vectors = seeded_normal(seeds, 0, self.width).to(states.dtype)
        for draw, (time, before) in enumerate(zip(times, [*times[1:], 0], strict=True), start=1):
            at = torch.full((len(states),), time, device=states.device)
            clean = self._denoised(vectors, states, at) * (1 + self.guidance)
            if self.guidance:
                clean -= self.guidance * self._denoised(vectors, self.nobody.expand_as(states), at)
            kept, kept_before = float(self.kept[time]), float(self.kept[before])
            alpha = kept / kept_before
            mean = (kept_before**0.5 * (1 - alpha) * clean + alpha**0.5 * (1 - kept_before) * vectors) / (1 - kept)
            deviation = ((1 - kept_before) / (1 - kept) * (1 - alpha)) ** 0.5
            vectors = mean
            if before:
                vectors = vectors + deviation * seeded_normal(seeds, draw, self.width).to(states.dtype)
        return vectors

    def queries(self, states: Tensor, seeds: Tensor | None = None) -> Tensor:
        """The oracles of the states, [batch, width]. Without `seeds`, the seeds are made of the states themselves."""
        return self.oracle(states, state_seeds(states) if seeds is None else seeds)

    def _denoised(self, noisy: Tensor, guidance: Tensor, times: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / max(1, half - 1))
        angles = times[:, None] * rates
        embedded = functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, self.width - 2 * half))
        return self.denoiser(torch.cat([noisy, guidance, self.time(embedded.to(noisy.dtype))], 1))


def state_seeds(states: Tensor) -> Tensor:
    """A seed for each state, made of its rounded values, int64 [batch]."""
    rounded = (states.float() * 1024).round().long()
    factors = torch.arange(1, states.shape[1] + 1, device=states.device) * -7046029254386353131
    return (rounded * factors).sum(1)
