"""Which recommender, and how large it is. This is the one place that knows all recommenders."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.recommenders.attention import Transformer
from raypipe.recommenders.bert4rec import Bert4Rec
from raypipe.recommenders.caser import Caser, CaserOptions
from raypipe.recommenders.dreamrec import DreamRec, DreamRecOptions
from raypipe.recommenders.gru4rec import Gru4Rec
from raypipe.recommenders.guided import GuidedOptions
from raypipe.recommenders.losses import LossConfig
from raypipe.recommenders.mf import Mf
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sasrec import SasRec

ModelName = Literal["gru4rec", "caser", "sasrec", "bert4rec", "dreamrec", "mf"]
_GUIDED = ("gru4rec", "sasrec", "bert4rec")


class RecommenderConfig(Config):
    """A model and its size. The options of models other than `model` do not matter."""

    model: ModelName = shaping("sasrec", "which recommender")
    width: int = shaping(64, "of states and item vectors", ge=2)
    max_length: int = shaping(200, "last items of a history a state sees", ge=2)
    layers: int = shaping(2, "transformer blocks or recurrent layers", ge=1)
    places: Literal["learned", "rotary"] = shaping(
        "learned", "how a transformer knows the order: vectors of places, or turned keys"
    )
    heads: int = shaping(1, "attention heads", ge=1)
    hidden: int = shaping(256, "width of feed-forward layers, and of gru4rec's state", ge=1)
    dropout: float = shaping(0.2, "of what layers read and give, in training", ge=0, le=0.99)
    attention_dropout: float = shaping(
        0.0,
        "of attention weights; above 0 the kernels that hold no [length, length] matrix are left on CPU",
        ge=0,
        le=0.99,
    )
    masked: float = shaping(0.2, "share of items bert4rec masks", gt=0, le=1)
    caser: CaserOptions = shaping(CaserOptions)
    dreamrec: DreamRecOptions = shaping(DreamRecOptions)
    guided: GuidedOptions = shaping(GuidedOptions)
    loss: LossConfig = shaping(LossConfig)

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> RecommenderConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared by {self.heads} heads: choose a multiple")
        return self

    @model_validator(mode="after")
    def _guided_models(self) -> RecommenderConfig:
        if self.guided.used and self.model not in _GUIDED:
            raise ValueError(f"guided is for {', '.join(_GUIDED)}, and the model is {self.model}")
        return self

    @property
    def items_seen(self) -> int:
        """How many last items of a history a state sees."""
        if self.model == "caser":
            return min(self.caser.window, self.max_length)
        return self.max_length - (self.model == "bert4rec")  # its last place holds the mask

    @property
    def objective(self) -> str:
        """What training minimises, in words."""
        if self.model == "bert4rec":
            return f"{self.loss.kind} of masked items"
        if self.model == "dreamrec":
            rounding = self.dreamrec.rounding
            return "squared error of item vectors" + (f" and {rounding:g} × {self.loss.kind}" if rounding else "")
        return self.loss.kind

    def build(self, items: int, seed: int = 0, blocks: tuple[int, int] = (0, 0)) -> Recommender:
        """An untrained model over `items` items; equal arguments give equal weights.

        `blocks` are the numbers of attributes and of users of its guided blocks, which still hold zeros.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._build(items)
        attributes, users = blocks
        if attributes:
            model.guide(attributes, users, self.guided)
        return model

    def _build(self, items: int) -> Recommender:
        size = (items, self.width, self.max_length, self.loss)
        if self.model == "sasrec":
            return SasRec(*size, self._transformer(causal=True))
        if self.model == "bert4rec":
            return Bert4Rec(*size, self._transformer(causal=False), self.masked)
        if self.model == "gru4rec":
            return Gru4Rec(*size, self.layers, self.hidden, self.dropout)
        if self.model == "caser":
            return Caser(*size, self.caser, self.dropout)
        if self.model == "mf":
            return Mf(*size, self.dropout)
        return DreamRec(*size, self._transformer(causal=True), self.dreamrec)

    def _transformer(self, *, causal: bool) -> Transformer:
        return Transformer(
            self.width,
            self.max_length,
            self.layers,
            self.heads,
            self.hidden,
            self.dropout,
            causal=causal,
            attention_dropout=self.attention_dropout,
            rotary=self.places == "rotary",
        )
