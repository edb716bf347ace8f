"""The seam between batch work and whatever generates text: prompts in, outcomes out.

An engine never raises for one bad prompt: that prompt's outcome carries an error and the others are answered. What it
does raise (a missing checkpoint, a bad setting) concerns every prompt and is raised by `EngineConfig.build`.

Importing this module loads neither torch nor transformers, so a driver can plan and fingerprint without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import model_validator

from raypipe.config import Config, free, shaping
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint

if TYPE_CHECKING:
    from raypipe.language.prompt import Prompt

FinishReason = Literal["stop", "length"]
ErrorKind = Literal["prompt_too_long", "unsupported_prompt"]
Dtype = Literal["float32", "bfloat16"]


# Each goes into fingerprints and is raised whenever the same prompt would get another answer.
VERSIONS = {"echo": 1, "transformers": 1}


class Decoding(Config):
    """How answers are decoded. Sampling is seeded by (seed, prompt text), never by the batch."""

    max_new_tokens: int = shaping(96, "most tokens of one answer", ge=1)
    temperature: float = shaping(0.0, "0 is greedy", ge=0)
    seed: int = shaping(0, "seed of sampling; without effect when greedy")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beyond text in, text out; a job refuses what is missing when it plans."""

    vectors: bool = False
    adapters: bool = False
    beams: bool = False
    trie: bool = False
    logprobs: bool = False
    streaming: bool = False


@dataclass(frozen=True, slots=True)
class OutcomeError:
    """Why one prompt has no answer."""

    kind: ErrorKind
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to prompt number `index` of the call, or the error in its place.

    `tokens_in` counts the prompt as the model reads it (chat wrapping included); `tokens_out` counts generated tokens
    without the end mark. `finish_reason` is "stop" when the model ended the answer, "length" when the limit did.
    """

    index: int
    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    finish_reason: FinishReason | None = None
    error: OutcomeError | None = None


class Engine(Protocol):
    """Answers prompts. `context` is the most tokens of prompt and answer together."""

    capabilities: Capabilities
    context: int

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Outcome]:
        """One outcome for each prompt, in whatever order suits the engine; `Outcome.index` tells which."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens each text takes inside a prompt, chat wrapping not counted."""
        ...


class EngineConfig(Config):
    """Which engine answers, with which model, and how fast it may go about it."""

    engine: Literal["echo", "transformers"] = shaping("transformers", "what generates")
    # The name of a model is a place; what shapes the output is its content, which `identity` hashes.
    lm: str = free("", "checkpoint folder or hub name; unused by echo")
    dtype: Dtype = shaping("float32", "precision of the weights and of decoding")
    context: int | None = shaping(None, "most tokens of prompt and answer; the model's own limit when unset", ge=2)
    device: str = free("auto", "cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    batch_tokens: int = free(32_768, "most tokens of prompts and answers held in one batch", ge=1)
    threads: int = free(0, "torch threads of this process; 0 leaves torch's own choice", ge=0)

    @model_validator(mode="after")
    def _a_model_is_named(self) -> EngineConfig:
        if self.engine != "echo" and not self.lm:
            raise ValueError(f"engine {self.engine!r} needs `lm`: a checkpoint folder or a hub name")
        return self

    def build(self) -> Engine:
        """The engine, weights loaded. Raises UsageError when the checkpoint cannot be found or read."""
        if self.engine == "echo":
            from raypipe.engines.echo import DEFAULT_CONTEXT, EchoEngine

            return EchoEngine(self.context or DEFAULT_CONTEXT)
        from raypipe.engines.transformers import TransformersEngine

        return TransformersEngine(self)

    def token_counter(self) -> Callable[[Sequence[str]], list[int]]:
        """What counts a text's tokens, without loading weights: for plans. Raises UsageError like `build`."""
        if self.engine == "echo":
            return lambda texts: [len(text.split()) for text in texts]
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint(self.lm), local_files_only=True)
        return lambda texts: [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def identity(self) -> dict[str, Any]:
        """What a fingerprint must hold of the engine: its name and version, its shaping settings, the model's content.

        Reads the checkpoint's files without loading them. Raises UsageError when there is no such checkpoint.
        """
        values = {**self.shaping_values(), "version": VERSIONS[self.engine]}
        if self.engine == "echo":
            # Precision means nothing to echo, so a change of it must not compute anything anew.
            return {key: value for key, value in values.items() if key != "dtype"}
        return {**values, "model": checkpoint_hash(resolve_checkpoint(self.lm))}
