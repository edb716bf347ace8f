"""What explanations name and give away: planted differences, controls at chance, scikit-learn as the reference."""

from __future__ import annotations

import random
import re
import time

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline

from raypipe.metrics.explanations import coherence, distinction
from raypipe.metrics.text import Vocabulary

TITLES = Vocabulary(
    ["Alien", "Aliens", "Alien: Resurrection", "M*A*S*H", "What? (1972)", "Airplane!", "Schindler's List", "Big"]
)
WORDS = [
    "film",
    "scene",
    "story",
    "actor",
    "plot",
    "mood",
    "score",
    "humour",
    "battle",
    "romance",
    "space",
    "city",
    "night",
    "river",
]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Aliens is not the other one.", ("Aliens",)),
        ("Alien: Resurrection, then Alien; Alien again", ("Alien: Resurrection", "Alien")),
        ("After M*A*S*H came What? (1972) and Airplane!", ("M*A*S*H", "What? (1972)", "Airplane!")),
        ("Schindler's List (“Big”)", ("Schindler's List", "Big")),
        ("MASH, Alienate, a big airplane! Bigger", ()),
    ],
)
def test_titles_are_named_longest_first_and_never_inside_others(text: str, named: tuple[str, ...]) -> None:
    assert TITLES.named(text) == named


def test_a_hundred_thousand_titles_are_found_as_by_one_expression_of_all_and_fast() -> None:
    drawn = random.Random(0)
    all_titles = {"The " + " ".join(drawn.choices(WORDS, k=drawn.randint(2, 6))) for _ in range(200_000)}
    titles = Vocabulary(all_titles)
    assert len(titles.values) > 100_000
    listed = sorted(titles.values)
    texts = [". ".join(drawn.choices(listed, k=3)) + ". The film was fine." for _ in range(2_000)]
    started = time.process_time()
    found = [titles.named(text) for text in texts]
    assert time.process_time() - started < 1.0  # 0.09 s on a free core
    for text, named in list(zip(texts, found, strict=True))[:20]:
        of_text = [title for title in listed if title in text]
        longest = "|".join(map(re.escape, sorted(of_text, key=len, reverse=True)))
        assert named == tuple(dict.fromkeys(re.findall(rf"(?<!\w)(?:{longest})(?!\w)", text)))


def written(cases: int, seed: int, habit: str = "", share: float = 0.0) -> list[str]:
    """Texts about their case, and in a share of them a word of habit."""
    drawn = random.Random(seed)
    texts = []
    for case in range(cases):
        about = [f"film{case}", *drawn.choices(WORDS, k=8), *([habit] if drawn.random() < share else [])]
        texts.append(" ".join(drawn.sample(about, len(about))))
    return texts


def test_writers_of_different_habits_are_told_apart() -> None:
    systems = {
        "one": written(60, 1, "indeed", 1),
        "two": written(60, 2, "moreover", 1),
        "three": written(60, 3, "thus", 1),
    }
    found = distinction(systems)
    assert found.accuracy > 0.95
    assert found.chance == pytest.approx(1 / 3)


def test_writers_of_one_habit_are_at_chance() -> None:
    found = distinction({"one": written(300, 1), "two": written(300, 2)})
    assert abs(found.accuracy - found.chance) < 0.08  # two standard deviations are .04
    # Equal texts are told by nothing, exactly: one of a case's guesses is right.
    same = written(40, 1)
    assert distinction({"one": same, "two": same, "three": same}).accuracy == pytest.approx(1 / 3)


def test_what_texts_say_of_their_case_does_not_mislead_the_classifier() -> None:
    # Each case's own words stand in the texts of both; learnt from one of them alone, they would speak against the other.
    texts = {name: [f"case{case} of{case} its{case}" for case in range(50)] for name in ("one", "two")}
    assert distinction(texts).accuracy == 0.5


def test_distinction_is_that_of_scikit_learn() -> None:
    systems = {"one": written(50, 1, "indeed", 0.6), "two": written(50, 2, "thus", 0.6), "three": written(50, 3)}
    texts = [text for mine in systems.values() for text in mine]
    writers = np.repeat(range(3), 50)
    folds = PredefinedSplit(np.tile(np.random.default_rng(0).permutation(50) % 5, 3))
    model = make_pipeline(TfidfVectorizer(token_pattern=r"\w+"), LogisticRegression(tol=1e-8, max_iter=1000))
    expected = (cross_val_predict(model, texts, writers, cv=folds) == writers).mean()
    assert 0.4 < expected < 0.95
    assert distinction(systems).accuracy == pytest.approx(expected)


@pytest.mark.parametrize(
    "systems", [{"one": ["a", "b"]}, {"one": ["a", "b"], "two": ["a"]}, {}, {"one": ["a"], "two": ["b"]}]
)
def test_what_cannot_be_compared_is_refused(systems: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="at least two"):
        distinction(systems)


def of_scores(scores: np.ndarray, seed: int) -> list[str]:
    drawn = random.Random(seed)
    said = ["poor" if score < -0.5 else "splendid" if score > 0.5 else "fair" for score in scores]
    return [" ".join([word, *drawn.choices(WORDS, k=6)]) for word in said]


def test_explanations_that_follow_the_score_are_coherent_and_shuffled_ones_are_not() -> None:
    scores = np.random.default_rng(0).normal(size=300)
    texts, users = of_scores(scores, 0), list(range(300))
    found = coherence(texts, 5 + scores, users)
    assert found.constant == pytest.approx(scores.var(), rel=0.05)
    assert found.mse < 0.4 * found.constant
    shuffled = coherence(random.Random(1).sample(texts, 300), 5 + scores, users)
    assert 0.9 * shuffled.constant < shuffled.mse < 1.3 * shuffled.constant


def test_coherence_does_not_learn_users_by_heart() -> None:
    offsets = np.repeat(np.random.default_rng(0).normal(size=40), 5)
    texts = [
        f"person{user} {text}" for user, text in zip(np.repeat(range(40), 5), of_scores(np.zeros(200), 0), strict=True)
    ]
    by_user = coherence(texts, offsets, np.repeat(range(40), 5).tolist())
    assert by_user.mse > 0.9 * by_user.constant
    assert coherence(texts, offsets, list(range(200))).mse < 0.5 * by_user.constant


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_coherence_is_the_ridge_regression_of_scikit_learn_whatever_the_scale(scale: float) -> None:
    scores = np.random.default_rng(0).normal(size=80) * scale
    texts = of_scores(scores / scale, 0)
    folds = PredefinedSplit(np.random.default_rng(0).permutation(80) % 5)
    model = make_pipeline(TfidfVectorizer(token_pattern=r"\w+"), Ridge(1.0))
    expected = ((cross_val_predict(model, texts, scores, cv=folds) - scores) ** 2).mean()
    found = coherence(texts, scores, list(range(80)))
    assert found.mse == pytest.approx(expected, rel=1e-3)


def test_texts_without_words_say_what_the_mean_says() -> None:
    scores = np.random.default_rng(0).normal(size=20)
    found = coherence(["", "?!"] * 10, scores, list(range(20)))
    assert found.mse == pytest.approx(found.constant)
    with pytest.raises(ValueError, match="at least two"):
        coherence(["a", "b"], np.zeros(2), ["ada", "ada"])
