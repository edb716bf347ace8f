"""What a walk through a trie may write: the texts and lists that it is of, all of them, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from raypipe.language.backbone import PromptTokenizer
from raypipe.language.builtin import train_tokenizer
from raypipe.language.trie import AnswerTrie, TokenTrie, Walk, answer_tokens

HOSTILE = ["A", "A;", "A; B", "B", " ", "…", "🎬 映画", "</s>", "A B", "B; A"]
USUAL = ["Toy Story (1995)", "Who?", "Alien", "Aliens", "Alien: Covenant (2017)", "M*A*S*H", "8½ (1963)", "映画!"]
NOTHING = np.array([], np.int32)


@pytest.fixture(scope="module", params=["built-in", "stories"])
def tokenizer(request: pytest.FixtureRequest) -> PromptTokenizer:
    if request.param == "built-in":
        texts = ["; ".join(random.Random(n).sample(USUAL, 4)) for n in range(200)]
        return PromptTokenizer(train_tokenizer(texts, [], [], 400))
    return PromptTokenizer(AutoTokenizer.from_pretrained(request.getfixturevalue("stories")))


def trie_of(tokenizer: PromptTokenizer, texts: list[str], separator: str = "; ", most: int = 1) -> AnswerTrie:
    return AnswerTrie(tokenizer, (tokenizer.tokenizer.eos_token_id,), texts, separator, most)


def whole(walk: Walk) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """All that a walk may become: its texts, and its tokens."""
    if not walk.places:
        yield walk.chosen, []
        return
    assert len(walk.next_tokens), "a walk never comes to nothing"
    for token in walk.next_tokens.tolist():
        yield from ((chosen, [token, *rest]) for chosen, rest in whole(walk.after(token)))


def test_a_walk_writes_one_of_the_texts_whatever_they_hold(tokenizer: PromptTokenizer) -> None:
    trie = trie_of(tokenizer, HOSTILE)
    found = dict(whole(trie.start))
    expected = [[*ids, trie.end] for ids in answer_tokens(tokenizer, HOSTILE)]
    assert found == {(number,): ids for number, ids in enumerate(expected)}
    assert trie.longest == max(map(len, expected))


@pytest.mark.parametrize("separator", ["; ", "\n", " | ", ","])
def test_a_walk_writes_all_lists_and_no_text_twice(tokenizer: PromptTokenizer, separator: str) -> None:
    texts = HOSTILE[:5]
    found = list(whole(trie_of(tokenizer, texts, separator, most=3).start))
    lists = [chosen for count in (1, 2, 3) for chosen in permutations(range(len(texts)), count)]
    assert all(chosen in lists for chosen, _ in found)

    def written(chosen: tuple[int, ...]) -> str:
        return separator.join(texts[number] for number in chosen)

    # Where a text holds the separator, one answer may be read as two lists.
    assert {written(chosen) for chosen, _ in found} == {written(chosen) for chosen in lists}
    assert len({tuple(ids) for _, ids in found}) == len(found)


def test_what_is_spelled_is_what_training_reads(tokenizer: PromptTokenizer) -> None:
    rng = random.Random(0)
    trie = trie_of(tokenizer, USUAL, most=5)
    for _ in range(100):
        listed = rng.sample(range(len(USUAL)), rng.randint(1, 5))
        (ids,) = tokenizer.tokenizer([" " + "; ".join(USUAL[number] for number in listed)], add_special_tokens=False)[
            "input_ids"
        ]
        walk = trie.start
        for token in [*ids, trie.end]:
            assert token in walk.next_tokens
            walk = walk.after(token)
        assert walk.chosen == tuple(listed)


def test_a_list_may_hold_all_texts_and_then_must_end(tokenizer: PromptTokenizer) -> None:
    found = {chosen for chosen, _ in whole(trie_of(tokenizer, ["A", "A B", "B"], most=9).start)}
    assert found == {chosen for count in (1, 2, 3) for chosen in permutations(range(3), count)}


def test_a_list_that_is_cut_keeps_its_whole_texts(tokenizer: PromptTokenizer) -> None:
    walk = trie_of(tokenizer, USUAL, most=3).start
    (ids,) = answer_tokens(tokenizer, ["Alien; Aliens; Toy Story (1995)"])
    kept = []
    for token in ids[:-1]:
        walk = walk.after(token)
        kept.append(walk.chosen)
    assert kept[0] == ()
    assert kept[-1] == (2, 3)


def test_of_texts_spelled_alike_the_first_is_chosen() -> None:
    folding = train_tokenizer(["alien heat"] * 9, [], [], 300)
    folding.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = list(whole(trie_of(PromptTokenizer(folding), ["Heat", "ALIEN", "alien"], most=3).start))
    assert sorted(chosen for chosen, _ in found) == [(0,), (0, 1), (1,), (1, 0)]


def test_a_text_that_cannot_be_spelled_is_refused(tokenizer: PromptTokenizer) -> None:
    (ids,) = answer_tokens(tokenizer, ["A"])
    with pytest.raises(ValueError, match="cannot spell ' A'"):
        AnswerTrie(tokenizer, (tokenizer.tokenizer.eos_token_id, ids[-1]), ["B", "A"])


def test_a_trie_tells_what_leads_on_to_sequences_that_count() -> None:
    trie = TokenTrie([[5, 1], [2], [5, 1, 3], [2], [5, 4]])
    assert trie.next_tokens(0, NOTHING).tolist() == [2, 5]
    five = trie.child(0, 5, NOTHING)
    assert five is not None
    assert trie.next_tokens(five, NOTHING).tolist() == [1, 4]
    one = trie.child(five, 1, NOTHING)
    assert one is not None
    assert (trie.end_at(one, NOTHING), trie.is_leaf(one)) == (0, False)
    assert trie.child(0, 3, NOTHING) is None
    without = np.sort(trie.ranks[[3, 0, 2]])
    assert trie.next_tokens(0, without).tolist() == [5]
    assert trie.next_tokens(five, without).tolist() == [4]
    assert trie.child(five, 1, without) is None
    two = trie.child(0, 2, NOTHING)
    assert two is not None
    assert (trie.end_at(two, NOTHING), trie.end_at(two, without)) == (1, None)


def test_a_catalogue_takes_little_memory() -> None:
    rng = np.random.default_rng(0)
    titles = np.minimum(rng.zipf(1.3, (20_000, 8)), 4000).tolist()
    trie = TokenTrie(titles)
    assert trie.nbytes < 160 * len(titles)
    for title in titles[::1000]:
        node = 0
        for token in title:
            found = trie.child(node, token, NOTHING)
            assert found is not None
            node = found
        assert trie.is_leaf(node)
