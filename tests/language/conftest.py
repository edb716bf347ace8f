"""A small catalogue with hostile titles, and a checkpoint of the built-in LM over it, not trained."""

import pytest

from raypipe.language.builtin import BuiltinLmConfig
from raypipe.language.catalogue import Catalogue
from raypipe.language.instructions import InstructionConfig
from raypipe.language.pretraining import LmDataConfig

GENRES = ["Drama", "Comedy", "Children's", "Sci-Fi", "Film-Noir", "War"]


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    titles = [f"Film {n} (19{n % 90 + 10})" for n in range(60)]
    attributes = [{"genre": sorted({GENRES[n % 6], GENRES[n * n % 5]})} for n in range(60)]
    return Catalogue(titles, attributes)


@pytest.fixture(scope="session")
def histories() -> list[list[int]]:
    return [[(user * 7 + step * step) % 60 + 1 for step in range(12 + user)] for user in range(20)]


@pytest.fixture(scope="session")
def tiny_data() -> LmDataConfig:
    return LmDataConfig(
        model=BuiltinLmConfig(size="tiny", vocabulary=600, context=512),
        instructions=InstructionConfig(block_examples=60, merge_examples=40, update_examples=40),
    )
