"""Published figures of recommenders on public data sets: leave-one-out, the whole catalogue, seen items filtered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Metric → value, who measured it, and how the model was trained."""

    values: Mapping[str, float]
    source: str
    training: str


_KLENITSKIY = "Klenitskiy & Vasilev, RecSys 2023"
# A data set is known by its users and events.
_MOVIELENS_1M = (6_040, 1_000_209)
_FIGURES = {
    (_MOVIELENS_1M, "sasrec"): Published(
        {"HR@10": 0.3159, "NDCG@10": 0.1857}, _KLENITSKIY, "softmax over 3,000 sampled negatives, last 200 items"
    ),
    (_MOVIELENS_1M, "bert4rec"): Published(
        {"HR@10": 0.2843, "NDCG@10": 0.1537}, _KLENITSKIY, "tuned, full softmax, last 200 items"
    ),
    (_MOVIELENS_1M, "gru4rec"): Published({"HR@10": 0.2811, "NDCG@10": 0.1648}, _KLENITSKIY, "full softmax"),
    (_MOVIELENS_1M, "caser"): Published({"HR@10": 0.1442, "NDCG@10": 0.0734}, "OpenP5", "untuned, a lower bound"),
}


def published(users: int, events: int, model: str) -> Published | None:
    """The best figures known of `model` on the public data set of so many users and events; None where there are none."""
    return _FIGURES.get(((users, events), model))
