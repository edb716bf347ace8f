"""LANCER's item representations (arXiv 2309.10435, section 4.1): last-layer states under the knowledge prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.language.prefixes import Prefix, behind

Representation = Literal["last", "mean", "padding", "all"]


def represent(
    reader: Any, prefix: Prefix | None, tokens: Tensor, mask: Tensor, kind: Representation, pad: int
) -> Tensor:
    """Representations [items, hidden] of contents.

    `tokens` int64 [items, length] are padded on the right, `mask` alike is 1 where a token stands. Kind "all" gives the
    states of all tokens, [items, length, hidden]. Kind "padding" is the embedding of the token `pad`, as in the
    published code: the same for every item.
    """
    if kind == "padding":
        return reader.get_input_embeddings().weight[pad].expand(len(tokens), -1)
    decoder, words = reader.get_decoder(), {"input_ids": tokens, "use_cache": False}
    knowledge = None if prefix is None else prefix.knowledge_of(len(tokens))
    if prefix is None or knowledge is None:
        states = decoder(**words, attention_mask=mask).last_hidden_state
    else:
        there = torch.ones(knowledge.shape[:2], dtype=torch.bool, device=tokens.device)
        states = behind(decoder, prefix.shape, knowledge, there, words, mask)
    if kind == "all":
        return states
    if kind == "mean":
        return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return states[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]


@torch.inference_mode()
def read_items(
    reader: Any,
    prefix: Prefix | None,
    contents: Sequence[Sequence[int]],
    kind: Representation,
    pad: int,
    batch_tokens: int = 4096,
) -> NDArray[np.float32]:
    """Representations float32 [items + 1, hidden] of all contents; row 0 is no item.

    `contents` are token ids in order of item index. Contents of similar length share a batch of at most `batch_tokens`
    tokens; a longer content is a batch by itself.
    """
    found: NDArray[np.float32] | None = None
    order = np.argsort([len(content) for content in contents], kind="stable")
    at = 0
    while at < len(order):
        # Contents come by rising length: the batch takes as many as fit when padded to its last, the longest.
        lengths = np.array([len(contents[place]) for place in order[at : at + batch_tokens]])
        size = max(1, int(np.searchsorted(lengths * np.arange(1, len(lengths) + 1), batch_tokens, side="right")))
        chosen = order[at : at + size]
        batch = {
            name: tensor.to(reader.device) for name, tensor in padded([contents[place] for place in chosen]).items()
        }
        states = represent(reader, prefix, batch["tokens"], batch["mask"], kind, pad).float().cpu().numpy()
        if found is None:
            found = np.zeros((len(contents) + 1, states.shape[1]), np.float32)
        found[chosen + 1] = states
        at += size
    assert found is not None, "a catalogue has items"
    return found


def padded(rows: Sequence[Sequence[int]], name: str = "", filling: int = 0) -> dict[str, Tensor]:
    """`tokens` int64 [rows, longest], padded on the right with `filling`, and `mask` alike; prefixed NAME/ if given."""
    prefix = f"{name}/" if name else ""
    tokens = np.full((len(rows), max(map(len, rows))), filling, np.int64)
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return {f"{prefix}tokens": torch.from_numpy(tokens), f"{prefix}mask": torch.from_numpy(mask)}
