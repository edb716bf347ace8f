"""Training the built-in language model: a prepared folder of tokenised examples, and the task a trainer runs on it.

`prepare_lm` writes, and `LmTask` reads, one folder:

    start/              the untrained checkpoint (configuration, tokenizer, random weights)
    tokens.npy          int32 [tokens], all examples one after the other
    ends.npy            int64 [examples], where each example ends in `tokens`
    answer_starts.npy   int32 [examples], how many tokens of each example carry no loss
    prepared.json       counts; written last, so that its existence means the rest is complete
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from raypipe.config import Config, shaping
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.batching import batches_of_like_length
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.language.instructions import Example, InstructionConfig, summary_examples
from raypipe.language.summary_prompts import SummaryPrompts, times
from raypipe.language.trie import answer_tokens

_MARKER = "prepared.json"
_ENCODED_AT_ONCE = 2048
_IGNORED = -100


class LmDataConfig(Config):
    """Options: what the built-in LM is, and what it is trained on."""

    model: BuiltinLmConfig = shaping(BuiltinLmConfig)
    prompts: SummaryPrompts = shaping(SummaryPrompts)
    instructions: InstructionConfig = shaping(InstructionConfig)


def prepare_lm(
    folder: Path, histories: Sequence[Sequence[int]], catalogue: Catalogue, config: LmDataConfig
) -> dict[str, int]:
    """Write the folder that a task trains from, and return its counts: examples, tokens, answer_tokens, vocabulary.

    `histories` hold item indices in time order, cut by the caller (`histories_before_cut`). The same arguments write
    the same bytes. Raises ValueError if the catalogue has no items or no example fits the context.
    """
    if not catalogue.titles:
        raise ValueError("A language model cannot be trained on a catalogue without items.")
    folder.mkdir(parents=True, exist_ok=True)
    examples = list(summary_examples(histories, catalogue, config.prompts, config.instructions))
    values = [value for attributes in catalogue.attributes for value in config.prompts.counts([attributes]).elements()]
    values += [times(count) for count in range(1, config.instructions.block_size + 1)] * len(values)
    answers = (example.answer for example in examples[:: max(1, len(examples) // 2000)])
    tokenizer = train_tokenizer(
        chain(catalogue.lines(config.prompts), answers),
        values,
        [config.prompts.block, config.prompts.merge, config.prompts.update],
        config.model.vocabulary,
    )
    save_untrained(folder / "start", config.model, tokenizer, config.instructions.seed)
    tokens, ends, answer_starts = _tokenised(examples, tokenizer, config.model.context)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "ends.npy", ends)
    np.save(folder / "answer_starts.npy", answer_starts)
    counts = {
        "examples": len(ends),
        "tokens": len(tokens),
        "answer_tokens": int(len(tokens) - answer_starts.sum()),
        "vocabulary": len(tokenizer),
    }
    (folder / _MARKER).write_text(json.dumps(counts))
    return counts


def _tokenised(examples: Iterable[Example], tokenizer: Any, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The examples' tokens one after the other, their ends, and their answers' starts.

    An example longer than the context is left out, because a truncated one would teach answers to what is not shown.
    """
    reader = PromptTokenizer(tokenizer)
    pieces: list[list[int]] = []
    starts: list[int] = []
    remaining = iter(examples)
    while chunk := list(islice(remaining, _ENCODED_AT_ONCE)):
        prompts = reader.tokens_of([example.prompt for example in chunk])
        # The space belongs to the answer, so that the prompt ends exactly as it will when the model is asked.
        answers = answer_tokens(reader, [example.answer for example in chunk])
        for prompt, answer in zip(prompts, answers, strict=True):
            if len(prompt) + len(answer) < context:
                pieces.append([*prompt, *answer, tokenizer.eos_token_id])
                starts.append(len(prompt))
    if not pieces:
        raise ValueError(f"No example fits the context of {context} tokens.")
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return np.fromiter(chain.from_iterable(pieces), np.int32, int(ends[-1])), ends, np.array(starts, np.int32)


class LmLoss(nn.Module):
    """A causal LM whose `forward` returns the cross-entropy of the answer tokens.

    Averaged over ranks, it is the mean over the answer tokens of all ranks. Logits are computed only where there is
    something to predict: with a vocabulary of 4,096 and a tenth of the tokens in answers, the rest would cost as much
    as the model itself.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm: Any = lm

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch.

        `tokens` int64 [batch, length] are padded on the right; `labels` alike, with −100 where no loss is taken.
        `count` is the number of answer tokens of all ranks, divided by the number of ranks.
        """
        # Padding comes after every real token, so the causal mask alone keeps it out.
        hidden = self.lm.model(input_ids=batch["tokens"], use_cache=False).last_hidden_state  # [batch, length, width]
        labels = batch["labels"][:, 1:]
        wanted = labels != _IGNORED
        logits = self.lm.lm_head(hidden[:, :-1][wanted])  # [answer tokens, vocabulary]
        return functional.cross_entropy(logits.float(), labels[wanted], reduction="sum") / batch["count"]


class LmTask:
    """The training task of an LM on a prepared folder. It is picklable and reads its files where it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / _MARKER).is_file():
            raise ValueError(f"{folder} holds no prepared examples; call prepare_lm first.")

        self._order: list[np.ndarray] = []
        self._order_of: tuple[int, int, int] | None = None

    def __reduce__(self) -> tuple[type[LmTask], tuple[Path]]:
        # Workers open the files themselves.
        return type(self), (self.folder,)

    def build(self) -> nn.Module:
        """The model to train; forward(batch) is its loss."""
        from transformers import AutoModelForCausalLM

        return LmLoss(AutoModelForCausalLM.from_pretrained(self.folder / "start", local_files_only=True))

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, len(self._ends) // batch_size)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        """This rank's share of the global batch of `step`: a function of the arguments alone.

        Batches hold examples of similar length, so that little is spent on padding.
        """
        epoch, index = divmod(step, self.steps_per_epoch(batch_size))
        if self._order_of != (epoch, seed, batch_size):
            lengths = self._ends - self._starts
            self._order = batches_of_like_length(lengths, (seed, epoch), batch_size)
            self._order_of = (epoch, seed, batch_size)
        whole = self._order[index]
        answers = self._ends[whole] - self._starts[whole] - self._answer_starts[whole]
        return {**self._padded(whole[rank::world]), "count": torch.tensor(float(answers.sum() / world))}

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write trained weights (by parameter name of `build()`) as a checkpoint in Hugging Face layout."""
        from safetensors.torch import save_file

        shutil.copytree(
            self.folder / "start", folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
        )
        lm = {name.removeprefix("lm."): tensor.contiguous() for name, tensor in weights.items()}
        save_file(lm, folder / "model.safetensors", metadata={"format": "pt"})

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.load(self.folder / "tokens.npy", mmap_mode="r")

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.load(self.folder / "ends.npy")

    @cached_property
    def _answer_starts(self) -> np.ndarray:
        return np.load(self.folder / "answer_starts.npy")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], self._ends[:-1]])

    def _padded(self, examples: np.ndarray) -> dict[str, Tensor]:
        starts, ends = self._starts[examples], self._ends[examples]
        shape = (len(examples), int((ends - starts).max()))
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, _IGNORED, np.int64)
        for row, (example, start, end) in enumerate(zip(examples, starts, ends, strict=True)):
            length, answer = end - start, self._answer_starts[example]
            tokens[row, :length] = self._tokens[start:end]
            labels[row, answer:length] = tokens[row, answer:length]
        return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
