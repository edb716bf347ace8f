"""The interface between batch work and whatever generates text: prompts in, outcomes out.

An engine never raises for one bad prompt: that prompt's outcome carries an error, and the others are answered. What it
does raise concerns every prompt: `EngineConfig.build` raises for a missing checkpoint or a bad setting, and the methods
raise, before the first outcome, for what the engine cannot do.

Importing this module loads neither torch nor transformers, so a driver can plan and fingerprint without them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import model_validator

from raypipe.config import Config, free, shaping
from raypipe.errors import RaypipeError, UsageError
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint

if TYPE_CHECKING:
    from raypipe.language.prompt import Prompt

FinishReason = Literal["stop", "length"]
ErrorKind = Literal[
    # of the prompt
    "prompt_too_long",
    "unsupported_prompt",
    # of an endpoint
    "refused",
    "timeout",
    "server_error",
    "bad_response",
    # of the model, whose weights are damaged or overflow in its dtype
    "not_finite",
    # of the answer
    "empty_output",
    "declined",
    "unended",
    "too_long",
    "malformed",
]
Dtype = Literal["float32", "bfloat16"]


# The version of each engine is part of fingerprints. It is raised whenever the same prompt would get another answer.
VERSIONS = {"echo": 1, "transformers": 3, "vllm": 3, "openai": 1}
DEFAULT_CONTEXT = 8192
_BYTES_PER_TOKEN = 2  # cautious: tokenizers make 3 to 5 of most scripts' text
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class EngineDownError(RaypipeError):
    """An engine answers no prompt at all. No prompt is to blame, and the work stops as it stands."""


class Decoding(Config):
    """How answers are decoded. Sampling is seeded by (seed, prompt text), never by the batch."""

    max_new_tokens: int = shaping(96, "most tokens of one answer", ge=1)
    temperature: float = shaping(0.0, "0 is greedy", ge=0)
    seed: int = shaping(0, "seed of sampling; without effect when greedy")
    beams: int = shaping(
        1, "answers that are followed at a time; above 1 the likeliest whole answers are searched", ge=1
    )

    @model_validator(mode="after")
    def _beams_are_not_drawn(self) -> Decoding:
        if self.beams > 1 and self.temperature:
            raise ValueError("beams above 1 are searched, not sampled: leave the temperature at 0")
        return self

    @property
    def most_written(self) -> int:
        """The most tokens of an outcome: those of an answer for each beam."""
        return self.beams * self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Choices:
    """What an answer may be: one to `most` of the texts, none twice, joined by the separator.

    Raises ValueError if there is no text, a text is empty or given twice, `most` is below 1, or an answer may hold
    several texts and the separator is empty.
    """

    texts: tuple[str, ...]
    separator: str = "; "
    most: int = 1

    def __post_init__(self) -> None:
        if not self.texts or not all(self.texts):
            raise ValueError("Answers are chosen among texts, of which none is empty.")
        if len(set(self.texts)) < len(self.texts):
            raise ValueError("A text is given twice: answers could not tell the two apart.")
        if self.most < 1 or (self.most > 1 and not self.separator):
            raise ValueError("An answer holds one text, or several with a separator between them.")

    def text(self, chosen: Sequence[int]) -> str:
        """The answer that consists of the texts with these numbers."""
        return self.separator.join(self.texts[number] for number in chosen)


def prompt_seed(seed: int, text: str) -> int:
    """A seed of 63 bits, made of the decoding's seed and the prompt. It is the same in every batch and process."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beyond text in, text out. A job refuses what is missing when it plans."""

    vectors: bool = False
    beams: bool = False
    trie: bool = False
    logprobs: bool = False

    def require(self, decoding: Decoding, choices: Choices | None = None) -> None:
        """Check that this engine can decode answers so. Raises UsageError if it cannot."""
        if decoding.beams > 1 and not self.beams:
            raise lacking("beam search")
        if choices is not None and not self.trie:
            raise lacking("answers held to given texts")


def lacking(ability: str) -> UsageError:
    """The error for an engine that is asked for an ability it lacks."""
    return UsageError(f"This engine has no {ability}.", "Choose --engine.engine transformers.")


@dataclass(frozen=True, slots=True)
class OutcomeError:
    """Why one prompt has no answer."""

    kind: ErrorKind
    message: str


@dataclass(frozen=True, slots=True)
class Beam:
    """One of the answers that a search found.

    `logprob` is the sum over its tokens, and the end mark if it ended. `chosen` are the numbers of its texts if it is
    held to given texts.
    """

    text: str
    logprob: float
    chosen: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to prompt number `index` of the call, or the error in its place.

    `calls` is how often the model was asked (over HTTP, the requests sent). Over all calls, `tokens_in` counts the
    prompt as the model reads it (chat wrapping included), and `tokens_out` what it generated, without the end mark.
    `finish_reason` is "stop" if the model ended the answer, "length" if the limit did. `chosen` are the numbers of the
    texts in an answer that is held to given texts; a list that the limit cut keeps those that are whole. After a search
    `beams` are the answers it found, best first, `tokens_out` is the sum over all of them, and all other fields are those
    of the best one.
    """

    index: int
    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    finish_reason: FinishReason | None = None
    error: OutcomeError | None = None
    calls: int = 1
    chosen: tuple[int, ...] = ()
    beams: tuple[Beam, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """The answer to prompt number `index` as far as it is written."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Scores:
    """The log-probabilities of the answers to prompt number `index`, in their order, or the error in their place.

    They are natural logarithms, summed over the tokens of an answer in float32. The end mark is not included, so the
    beginning of an answer is at least as likely as the answer.
    """

    index: int
    logprobs: tuple[float, ...] = ()
    tokens_in: int = 0
    error: OutcomeError | None = None


class Engine(Protocol):
    """Answers prompts. `context` is the most tokens of prompt and answer together."""

    capabilities: Capabilities
    context: int

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
    ) -> Iterator[Outcome]:
        """Yield one outcome for each prompt, in any order; `Outcome.index` is the prompt's number.

        With `choices`, every answer is one of them. Raises UsageError if the engine lacks a capability that is needed,
        or if `max_new_tokens` leave no room for the longest choice.
        """
        ...

    def stream(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Piece | Outcome]:
        """As `generate`, but yield each answer as far as it is written whenever it has grown, before its outcome.

        Raises UsageError if the engine cannot stream, and for a search: only at their ends is known which beam is best.
        """
        ...

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Iterator[Scores]:
        """Yield the log-probabilities of each prompt's answers, in any order of prompts.

        A space comes before every answer. Raises UsageError without the capability `logprobs`, and ValueError for a
        prompt without answers or an empty answer.
        """
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text takes inside a prompt, without chat wrapping."""
        ...


class HttpConfig(Config):
    """An endpoint with OpenAI's chat completions API."""

    url: str = free("", "address up to /v1, for example http://vllm:8000/v1")
    model: str = shaping("", "the model's name there; what it stands for is the endpoint's business")
    tokenizer: str = free("", "checkpoint folder or hub name that counts tokens; unset: two bytes are taken for one")
    key_variable: str = free("OPENAI_API_KEY", "environment variable of the workers that holds the key, if any")
    consent: bool = free(False, "user text may be sent to a host that is not this machine")
    concurrency: int = free(64, "requests in flight of each worker", ge=1)
    timeout_s: float = free(120.0, "of one attempt, in seconds", gt=0)
    attempts: int = free(5, "at one prompt, before it is rejected", ge=1)

    @model_validator(mode="after")
    def _an_address_that_may_be_told(self) -> HttpConfig:
        host = urlsplit(self.url).hostname
        if self.url and (host is None or not self.url.startswith(("http://", "https://"))):
            raise ValueError(f"url {self.url!r} is no http:// or https:// address")
        if self.url and not self.consent and host not in _LOOPBACK:
            raise ValueError(
                f"prompts hold what users did, and would be sent to {host}: set consent to true if they may be"
            )
        return self


class VllmConfig(Config):
    """How vLLM uses GPUs; reserve as many for a worker with `cluster.gpus_per_worker`."""

    gpus: int = free(1, "that share one copy of the model (tensor parallel)", ge=1)
    memory_share: float = free(0.9, "of each GPU's memory; workers that share a GPU share this", gt=0, le=1)


class EngineConfig(Config):
    """Which engine answers, with which model, and how fast it may go about it."""

    engine: Literal["echo", "transformers", "vllm", "openai"] = shaping("transformers", "what generates")
    # A model's name is only a place. Its content shapes the output, and `identity` hashes that.
    lm: str = free("", "checkpoint folder or hub name; for transformers and vllm")
    adapter: str = free("", "folder of an adapter, so that transformers reads a recommender's vectors too")
    dtype: Dtype = shaping("float32", "precision of the weights and of decoding")
    context: int | None = shaping(None, "most tokens of prompt and answer; the model's own limit when unset", ge=2)
    device: str = free("auto", "cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    batch_tokens: int = free(32_768, "most tokens of prompts and answers held in one batch", ge=1)
    threads: int = free(0, "torch threads of this process; 0 leaves torch's own choice", ge=0)
    vllm: VllmConfig = shaping(VllmConfig, "the GPUs of vllm")
    http: HttpConfig = shaping(HttpConfig, "the endpoint of openai")

    @model_validator(mode="after")
    def _a_model_is_named(self) -> EngineConfig:
        if self.engine == "openai" and not (self.http.url and self.http.model):
            raise ValueError("engine 'openai' needs http.url and http.model")
        if self.adapter and self.engine != "transformers":
            raise ValueError(f"engine {self.engine!r} reads no adapter: choose transformers")
        if self.reads_checkpoint and not self.lm:
            raise ValueError(f"engine {self.engine!r} needs `lm`: a checkpoint folder or a hub name")
        return self

    @property
    def reads_checkpoint(self) -> bool:
        """Whether the workers load the weights of `lm` themselves."""
        return self.engine in {"transformers", "vllm"}

    @property
    def model_name(self) -> str:
        """The name of the model in reports; empty for echo."""
        return {"openai": self.http.model, "echo": ""}.get(self.engine, self.lm)

    @property
    def most_calls(self) -> int:
        """The most `Outcome.calls` of one prompt: over HTTP its attempts, and those of the probe after they failed."""
        return 2 * self.http.attempts if self.engine == "openai" else 1

    @property
    def capabilities(self) -> Capabilities:
        """What the engine that `build` makes can do, without making it; what is missing is refused before work."""
        if self.engine == "transformers":
            return Capabilities(vectors=bool(self.adapter), beams=True, trie=True, logprobs=True)
        return Capabilities()

    def build(self) -> Engine:
        """Make the engine, with its weights loaded. Raises UsageError if the checkpoint cannot be found or read."""
        if self.engine == "echo":
            from raypipe.engines.echo import EchoEngine

            return EchoEngine(self.context or DEFAULT_CONTEXT)
        if self.engine == "openai":
            from raypipe.engines.http import HttpEngine

            return HttpEngine(self.http, self.context or DEFAULT_CONTEXT, self.token_counter())
        if self.engine == "vllm":
            from raypipe.engines.vllm import VllmEngine

            return VllmEngine(self)
        from raypipe.engines.transformers import TransformersEngine

        return TransformersEngine(self)

    def token_counter(self) -> Callable[[Sequence[str]], list[int]]:
        """A function that counts the tokens of texts without loading weights. Raises UsageError as `build` does."""
        if self.engine == "echo":
            return lambda texts: [len(text.split()) for text in texts]
        named = self.http.tokenizer if self.engine == "openai" else self.lm
        if not named:
            return lambda texts: [-(-len(text.encode()) // _BYTES_PER_TOKEN) for text in texts]
        from raypipe.language.backbone import load_tokenizer

        return load_tokenizer(named).count_tokens

    def identity(self) -> dict[str, Any]:
        """What a fingerprint must hold of the engine: its name and version, its shaping settings, the model's content.

        It reads the checkpoint's files without loading them. Raises UsageError if there is no such checkpoint or
        adapter.
        """
        values = {**self.shaping_values(), "version": VERSIONS[self.engine]}
        values.pop("vllm")  # it only says where the model runs
        # A change of a setting that means nothing to this engine must not compute anything anew.
        if self.engine != "openai":
            values.pop("http")
        if not self.reads_checkpoint:
            values.pop("dtype")
            return values
        if self.adapter:
            if not (Path(self.adapter) / "adapter.json").is_file():
                raise UsageError(f"{self.adapter} holds no adapter.", "Name the folder of one made by `raypipe align`.")
            values["adapter"] = checkpoint_hash(Path(self.adapter))
        return {**values, "model": checkpoint_hash(resolve_checkpoint(self.lm))}
