"""Families of prompts: every prompt in one, each sharing what all of its members begin with, and few tokens read twice."""

from __future__ import annotations

import random
from itertools import product

import pytest

from raypipe.engines.beginnings import Family, families


def read_tokens(prompts: list[list[int]], found: list[Family]) -> int:
    """Tokens of a family's beginning once, and of what is left of each member."""
    return sum(family.shared + sum(len(prompts[n]) - family.shared for n in family.members) for family in found)


def test_the_prompts_of_each_user_are_a_family_whatever_order_they_come_in() -> None:
    users = {user: [1, 2, 3, *[10 + user] * 20] for user in range(3)}
    asked = [(user, candidate) for candidate, user in product(range(5), users)]
    found = families([[*users[user], 100 + candidate, 7] for user, candidate in asked], 8)
    assert sorted(sorted(family.members) for family in found) == [
        [number for number, (mine, _) in enumerate(asked) if mine == user] for user in users
    ]
    assert {family.shared for family in found} == {23}


def test_of_beginnings_in_one_another_the_one_is_shared_that_saves_more() -> None:
    stem, short, long = [1] * 10, [2] * 4, [3] * 40
    few = [[*stem, *short, n] for n in range(4)] + [[*stem, 5 + n] for n in range(8)] + [[9]]
    assert max(families(few, 8), key=lambda family: family.shared).shared == len(stem)
    many = [[*stem, *long, n] for n in range(4)] + [[*stem, 5], [9]]
    assert sorted(family.shared for family in families(many, 8)) == [0, 0, len(stem + long)]


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_is_in_one_family_and_has_a_token_of_its_own(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [[draw.randrange(2) for _ in range(draw.randrange(1, 12))] for _ in range(40)]
    found = families(prompts, 2)
    assert sorted(number for family in found for number in family.members) == list(range(len(prompts)))
    for family in found:
        assert len({tuple(prompts[number][: family.shared]) for number in family.members}) == 1
        assert all(len(prompts[number]) > family.shared for number in family.members)
        lengths = [len(prompts[number]) for number in family.members]
        assert lengths == sorted(lengths, reverse=True)
        assert family.shared == 0 if len(family.members) == 1 else family.shared >= 2
    assert read_tokens(prompts, found) <= sum(map(len, prompts))


def test_what_everybody_shares_makes_no_family() -> None:
    assert [family.shared for family in families([[*[1] * 20, n] for n in range(5)], 8)] == [0] * 5
    assert families([], 8) == []
