"""Generation with vLLM, for models that need paged memory or several GPUs.

vLLM is a package of its own, imported when chosen. It shares the keys and values of what prompts begin with, and
refills its batches itself. Its kernels sum in an order that depends on the batch: a greedy answer may differ between
two runs if two tokens are all but equally likely.

Not covered: beams, answers held to given texts, and log-probabilities. The engine `transformers` has all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from raypipe.engines.encoded import encode_prompts
from raypipe.engines.engine import Capabilities, Choices, Decoding, Outcome, Piece, Scores, lacking, prompt_seed
from raypipe.errors import UsageError
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.checkpoint import resolve_checkpoint
from raypipe.language.prompt import Prompt

if TYPE_CHECKING:
    from raypipe.engines.engine import EngineConfig


class VllmEngine:
    """Answers prompts with vLLM; implements `Engine`."""

    capabilities = Capabilities()

    def __init__(self, config: EngineConfig) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise UsageError(
                f"The engine vllm cannot be imported: {error}.",
                "Install raypipe[gpu] on the workers, or choose --engine.engine transformers.",
            ) from error
        self._llm = LLM(
            model=str(resolve_checkpoint(config.lm)),
            dtype=config.dtype,
            max_model_len=config.context,
            tensor_parallel_size=config.vllm.gpus,
            gpu_memory_utilization=config.vllm.memory_share,
            enable_prefix_caching=True,
            # Otherwise a checkpoint's own settings of sampling would apply, which `Decoding` does not know.
            generation_config="vllm",
            seed=0,
        )
        self._tokenizer = PromptTokenizer(self._llm.get_tokenizer())
        self.context: int = self._llm.llm_engine.model_config.max_model_len

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._tokenizer.count_tokens(texts)

    def stream(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Piece | Outcome]:
        raise lacking("answers piece by piece")

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Iterator[Scores]:
        raise lacking("log-probabilities")

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
    ) -> Iterator[Outcome]:
        from vllm import SamplingParams

        self.capabilities.require(decoding, choices)
        room = [decoding.max_new_tokens] * len(prompts)
        encoded, refused = encode_prompts(self._tokenizer, prompts, room, self.context)
        yield from refused
        sampling = [
            SamplingParams(
                max_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                seed=prompt_seed(decoding.seed, prompts[index].text) if decoding.temperature else None,
            )
            for index in encoded
        ]
        tokens = [{"prompt_token_ids": row.ids} for row in encoded.values()]
        for index, request in zip(encoded, self._llm.generate(tokens, sampling, use_tqdm=False), strict=True):
            (answer,) = request.outputs
            ended = answer.finish_reason == "stop"
            # vLLM counts the end mark among the tokens; it is not part of the answer.
            written = len(answer.token_ids) - int(ended)
            yield Outcome(index, answer.text.strip(), len(encoded[index].ids), written, "stop" if ended else "length")
