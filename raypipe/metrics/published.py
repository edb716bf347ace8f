"""Published figures to compare with ours: of recommenders on public data sets, and of the systems in their papers.

Recommenders: leave-one-out, the whole catalogue, seen items filtered. A system's figures are from other data and larger
language models than ours, unless the data set says otherwise, and serve only as orientation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MOVIELENS_1M = "ml-1m"
MOVIELENS_100K = "ml-100k"


@dataclass(frozen=True)
class Published:
    """Metric → value, the source of the figures, and how the model was trained."""

    values: Mapping[str, float]
    source: str
    training: str


# A data set is recognised by its numbers of users and events.
DATA_SETS = {(6_040, 1_000_209): MOVIELENS_1M, (943, 100_000): MOVIELENS_100K}

_KLENITSKIY = "Klenitskiy & Vasilev, RecSys 2023"
_FIGURES = {
    (MOVIELENS_1M, "sasrec"): Published(
        {"HR@10": 0.3159, "NDCG@10": 0.1857}, _KLENITSKIY, "softmax over 3,000 sampled negatives, last 200 items"
    ),
    (MOVIELENS_1M, "bert4rec"): Published(
        {"HR@10": 0.2843, "NDCG@10": 0.1537}, _KLENITSKIY, "tuned, full softmax, last 200 items"
    ),
    (MOVIELENS_1M, "gru4rec"): Published({"HR@10": 0.2811, "NDCG@10": 0.1648}, _KLENITSKIY, "full softmax"),
    (MOVIELENS_1M, "caser"): Published({"HR@10": 0.1442, "NDCG@10": 0.0734}, "OpenP5", "untuned, a lower bound"),
}

_EXPLAINED = ("T1 HR@5", "T2 NDCG@5", "T3 accuracy", "T6 HCR")
_AMONG_21 = ("Recall@3", "MRR@3")
_GENERATED = ("Recall@5", "NDCG@5")
_CUTOFFS = (3, 5, 10)
_OF_PAPERS: list[tuple[str, str, str, tuple[str, ...], dict[str, dict[str, tuple[float, ...]]]]] = [
    (
        "RecExplainer",
        "RecExplainer, arXiv 2311.10947",
        "of SASRec, by Vicuna 7B",
        _EXPLAINED,
        {
            "-B": {"Games": (0.746, 0.752, 0.837), "Movies": (0.811, 0.703, 0.782), "Steam": (0.931, 0.870, 0.955)},
            "-I": {
                "Games": (0.844, 0.830, 0.939, 0.116),
                "Movies": (0.904, 0.829, 0.840, 0.120),
                "Steam": (0.962, 0.908, 0.990, 0.066),
            },
            "-H": {
                "Games": (0.806, 0.846, 0.919, 0.133),
                "Movies": (0.877, 0.764, 0.811, 0.146),
                "Steam": (0.936, 0.904, 0.982, 0.071),
            },
        },
    ),
    (
        "LLM-TRSR",
        "LLM-TRSR, arXiv 2403.13325",
        "21 candidates",
        _AMONG_21,
        {
            " hierarchical": {"Amazon-M2": (0.891, 0.860), "MIND": (0.916, 0.851)},
            " recurrent": {"Amazon-M2": (0.891, 0.863), "MIND": (0.906, 0.840)},
        },
    ),
    (
        "LANCER",
        "LANCER, arXiv 2309.10435",
        "the whole catalogue",
        _GENERATED,
        {"": {"MovieLens": (0.1086, 0.0712), "MIND": (0.1168, 0.0766), "Goodreads": (0.2121, 0.1600)}},
    ),
]
SYSTEMS: Mapping[tuple[str, str], Published] = {
    (system + variant, dataset): Published(dict(zip(metrics, values, strict=False)), source, how)
    for system, source, how, metrics, variants in _OF_PAPERS
    for variant, sets in variants.items()
    for dataset, values in sets.items()
}
"""(system, data set of its paper) → figures. Guided refinement's are relative gains of 10–50 % (arXiv 2504.11658), and of
RecInterpreter (arXiv 2310.20487) there is no table."""

PUBLISHED_BY: Mapping[str, tuple[str, ...]] = {system: metrics for system, _, _, metrics, _ in _OF_PAPERS}
"""System → the metrics that its paper has figures of."""

CHANCE: Mapping[str, float] = {"T2 NDCG@5": 0.6131, "T2 NDCG@5 by interest": 0.6131, "T3 accuracy": 0.5}
"""What an order without an opinion is worth."""


def chance_among(candidates: int) -> dict[str, float]:
    """The values of chance, as in `CHANCE`, for metrics of `candidates` candidates of which one is relevant."""
    found = {}
    for k in _CUTOFFS:
        places = range(1, min(k, candidates) + 1)
        found[f"Recall@{k}"] = len(places) / candidates
        found[f"MRR@{k}"] = sum(1 / place for place in places) / candidates
    return found


def published(users: int, events: int, model: str) -> Published | None:
    """The best known figures of `model` on a public data set; None if there are none.

    The data set is recognised by its numbers of users and events.
    """
    return published_on(DATA_SETS.get((users, events), ""), model)


def published_on(dataset: str, model: str) -> Published | None:
    """The same as `published`, by the data set's name."""
    return _FIGURES.get((dataset, model))
