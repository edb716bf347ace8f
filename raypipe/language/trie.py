"""Constraining answers to given texts: a trie over their tokens tells which tokens may come next.

An answer is one text, or several with a separator between them, and then the end mark. Texts are tokenised as they
stand in a trained answer: with a space before the first, and together with the beginning of the separator that follows.
This is because a tokenizer may join the two: the built-in one makes `);` one token. The answer is cut before the
separator's last space:

    " Alien (1979); Dune; Heat"  =  " Alien (1979);"  +  " Dune;"  +  " Heat"  +  end

So an answer is spelled by the same tokens that training reads, both with byte-level tokenizers and with those that put
a space before every text. Not covered: a tokenizer that joins words across spaces, whose training may spell the same
text differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from raypipe.language.backbone import PromptTokenizer

_WORD = " A"  # Stands before a separator, to tokenise what follows the separator.


class TokenTrie:
    """A tree of token-id sequences in flat arrays: a node is a number, the root is 0, children are in order of token.

    A sequence's rank is its place in lexicographic order; equal sequences have the same rank. Below a node are the
    sequences of ranks `low` to `high` (exclusive). Measured: 100,000 titles of 6.2 tokens make 574,000 nodes and 12 MB,
    built in 0.4 s of CPU; tokenising them takes 2.7 s.
    """

    def __init__(self, sequences: Sequence[list[int]]) -> None:
        order = sorted(range(len(sequences)), key=sequences.__getitem__)
        fresh = [not at or sequences[order[at]] != sequences[order[at - 1]] for at in range(len(order))]
        self.ranks = np.zeros(len(order), np.int32)
        self.ranks[order] = np.cumsum(fresh) - 1
        self.owners = np.array(order, np.int32)[fresh]
        """The first sequence of each rank."""
        kept = [sequences[owner] for owner in self.owners.tolist()]
        lengths = np.array([len(sequence) for sequence in kept])
        flat = np.fromiter(chain.from_iterable(kept), np.int32, int(lengths.sum()))
        self._grow(flat, np.cumsum(lengths) - lengths, lengths)

    def _grow(self, flat: NDArray[np.int32], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Build the tree level by level, so that a node's children are adjacent."""
        ranks = len(lengths)
        node = np.zeros(ranks, np.int32)  # the node that each sequence has reached
        levels = [(np.array([-1], np.int32), np.array([-1], np.int32), np.array([0]), np.array([ranks]))]
        nodes = 1
        while len(rows := np.flatnonzero(lengths >= len(levels))):
            tokens, parents = flat[starts[rows] + len(levels) - 1], node[rows]
            new = np.ones(len(rows), bool)
            new[1:] = (tokens[1:] != tokens[:-1]) | (parents[1:] != parents[:-1])
            node[rows] = nodes + np.cumsum(new) - 1
            last = np.append(np.flatnonzero(new)[1:] - 1, len(rows) - 1)
            levels.append((tokens[new], parents[new], rows[new], rows[last] + 1))
            nodes += int(new.sum())
        tokens, parents, low, high = (np.concatenate(parts).astype(np.int32) for parts in zip(*levels, strict=True))
        self._tokens, self._low, self._high = tokens, low, high
        self._children = np.searchsorted(parents, np.arange(nodes + 1)).astype(np.int32)
        self._ends = np.full(nodes, -1, np.int32)
        self._ends[node] = np.arange(ranks)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take."""
        return sum(part.nbytes for part in vars(self).values())

    def next_tokens(self, node: int, without: NDArray[np.int32]) -> NDArray[np.int32]:
        """The tokens that lead on from a node, in order; `without` are the sorted ranks of excluded sequences."""
        children = slice(self._children[node], self._children[node + 1])
        return self._tokens[children][self._lead_on(children, without)] if len(without) else self._tokens[children]

    def child(self, node: int, token: int, without: NDArray[np.int32]) -> int | None:
        """The child node that a token leads to; None if there is none with a sequence that is not excluded."""
        first, stop = int(self._children[node]), int(self._children[node + 1])
        place = first + int(np.searchsorted(self._tokens[first:stop], token))
        if place == stop or self._tokens[place] != token:
            return None
        return place if not len(without) or self._lead_on(slice(place, place + 1), without)[0] else None

    def is_leaf(self, node: int) -> bool:
        return bool(self._children[node] == self._children[node + 1])

    def end_at(self, node: int, without: NDArray[np.int32]) -> int | None:
        """The first sequence that ends at a node; None if there is none or it is excluded."""
        rank = self._ends[node]
        return None if rank < 0 or rank in without else int(self.owners[rank])

    def _lead_on(self, nodes: slice, without: NDArray[np.int32]) -> NDArray[np.bool_]:
        low, high = self._low[nodes], self._high[nodes]
        return high - low > np.searchsorted(without, high) - np.searchsorted(without, low)


class AnswerTrie:
    """The answers that hold one of the texts, or up to `most` distinct ones, as a tokenizer spells them.

    `ends` are the tokens that end an answer; the first stands for all of them. `longest` is the largest number of
    tokens of one text with what ends it. Of texts that the tokenizer spells alike, the first is chosen. Raises
    ValueError if a text takes no token, or a token that ends answers.
    """

    def __init__(
        self, tokenizer: PromptTokenizer, ends: Sequence[int], texts: Sequence[str], separator: str = "", most: int = 1
    ) -> None:
        self.end = ends[0]
        stem = separator.rstrip()
        rest = separator[len(stem) :]
        first = [" " + text for text in texts]
        alone = _spelled(tokenizer, first, ends)
        self._first = _Tries(TokenTrie([[*ids, self.end] for ids in alone]))
        self.longest = 1 + max(map(len, alone))
        self.most = 1
        self._later = self._first
        if most > 1:
            later = [rest + text for text in texts]
            followed = _spelled(tokenizer, [text + stem for text in first], ends)
            pieces = _continued(tokenizer, _WORD + stem, later, ends)
            more = _continued(tokenizer, _WORD + stem, [text + stem for text in later], ends)
            self._first = _Tries(self._first.last, TokenTrie(followed))
            if (pieces, more) == (alone, followed):
                self._later = self._first
            else:
                self._later = _Tries(TokenTrie([[*ids, self.end] for ids in pieces]), TokenTrie(more))
            self.longest = max(self.longest, *map(len, followed))
            distinct = (len(trie.owners) for trie in self.tries)
            self.most = min(most, *distinct)  # So that no list runs out of texts before it ends.
        self.start = Walk(self, self.places(()), ())

    @property
    def tries(self) -> list[TokenTrie]:
        """All tries that are walked, each once."""
        found = [self._first.last, self._first.followed, self._later.last, self._later.followed]
        return list({id(trie): trie for trie in found if trie is not None}.values())

    def places(self, chosen: tuple[int, ...]) -> tuple[_Place, ...]:
        """Places where a text may begin after those `chosen`: one for a last text, one if another text may follow."""
        tries = self._later if chosen else self._first
        goes_on = tries.followed is not None and len(chosen) + 1 < self.most
        kinds = [tries.last, tries.followed] if goes_on else [tries.last]
        return tuple(_Place(trie, 0, chosen) for trie in kinds if trie is not None)


@dataclass(frozen=True)
class Walk:
    """The beginning of an answer: each way to read its tokens is a place; `chosen` numbers its complete texts.

    There is more than one place if it is still open what follows a text, or if a title holds the separator.
    """

    trie: AnswerTrie
    places: tuple[_Place, ...]
    chosen: tuple[int, ...]

    @cached_property
    def next_tokens(self) -> NDArray[np.int64]:
        """The tokens that may come next, at least one; only the end token once the answer has ended."""
        if not self.places:
            return np.array([self.trie.end])
        found = [place.trie.next_tokens(place.node, place.without) for place in self.places]
        return np.unique(np.concatenate(found)).astype(np.int64)

    def after(self, token: int) -> Walk:
        """The answer continued by `token`, which must be one of the next tokens."""
        places: list[_Place] = []
        for place in self.places:
            node = place.trie.child(place.node, token, place.without)
            if node is None:
                continue
            text = place.trie.end_at(node, place.without)
            if text is not None:
                chosen = (*place.chosen, text)
                if token == self.trie.end:
                    return Walk(self.trie, (), chosen)
                places += self.trie.places(chosen)
            if not place.trie.is_leaf(node):
                places.append(_Place(place.trie, node, place.chosen))
        assert places, f"{token} is none of the next tokens"
        return Walk(self.trie, tuple(places), max((place.chosen for place in places), key=len))


@dataclass(frozen=True)
class _Tries:
    """The texts as spelled before the end (`last`) and before another text (`followed`, None if none may follow)."""

    last: TokenTrie
    followed: TokenTrie | None = None


@dataclass(frozen=True)
class _Place:
    """A node in a trie, on the way to the text that follows those `chosen`."""

    trie: TokenTrie
    node: int
    chosen: tuple[int, ...]

    @cached_property
    def without(self) -> NDArray[np.int32]:
        """The sorted ranks of the chosen texts."""
        return np.unique(self.trie.ranks[list(self.chosen)])


def answer_tokens(tokenizer: PromptTokenizer, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of whole answers as they follow a prompt, with a space before each; marks such as `</s>` are words."""
    return tokenizer.tokens_of([f" {answer}" for answer in answers])


def _spelled(tokenizer: PromptTokenizer, pieces: Sequence[str], ends: Sequence[int]) -> list[list[int]]:
    found = tokenizer.tokens_of(pieces)
    for piece, ids in zip(pieces, found, strict=True):
        if not ids or set(ids) & set(ends):
            raise ValueError(f"The tokenizer cannot spell {piece!r} as a part of an answer.")
    return found


def _continued(tokenizer: PromptTokenizer, before: str, pieces: Sequence[str], ends: Sequence[int]) -> list[list[int]]:
    """Tokens of each piece as it follows `before`, or as it stands alone if a token joins the two."""
    (start,) = tokenizer.tokens_of([before])
    at = len(start)
    whole = tokenizer.tokens_of([before + piece for piece in pieces])
    joined = [number for number, ids in enumerate(whole) if ids[:at] != start or not ids[at:] or set(ids) & set(ends)]
    found = [ids[at:] for ids in whole]
    for number, ids in zip(joined, _spelled(tokenizer, [pieces[number] for number in joined], ends), strict=True):
        found[number] = ids
    return found
