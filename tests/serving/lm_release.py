"""A release with a language model: one model of random weights that knows the titles, and an adapter of each system."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.storage.models import Models, find_model
from raypipe.storage.releases import Release, Releases
from raypipe.storage.store import Store
from raypipe.systems.lancer import LancerConfig, LancerPrompts
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig
from raypipe.systems.trsr import TrsrConfig
from tests.made import MODEL, publish
from tests.pipeline.conftest import asked_templates
from tests.pipeline.ranked_logs import TERSE
from tests.pipeline.small_logs import CHAIN_ITEMS
from tests.untrained import OF_LM, store_untrained_adapter, store_untrained_ranker, store_untrained_writer

EXPLAINERS = (ExplainerConfig(), ExplainerConfig(variant="I"))
INTERPRETER = InterpreterConfig(after="item")
RANKER = TrsrConfig(prompt=TERSE, facts=True)
WRITER = LancerConfig(
    reads=3,
    shown=4,
    virtual_tokens=3,
    beams=6,
    text_characters=0,
    constrained=True,
    prompts=LancerPrompts(line="{title}"),
)
TOKENS = 12
"""Of an answer: random weights never end one."""
LINE = 8
"""Tokens of a line that is written."""
SHORT = {
    "answer_tokens": LINE,
    "explanation": {"max_new_tokens": TOKENS},
    "reading": {"max_new_tokens": TOKENS},
    "checks": {"retries": 0, "most_characters": 100_000},
    "summaries": {"block_decoding": {"max_new_tokens": TOKENS}, "merge_decoding": {"max_new_tokens": TOKENS}},
}
FREE = {"max_new_tokens": TOKENS, "constrained": False}
"""Reading that is held to no titles."""


def add_lm_release(uri: str, folder: Path) -> Release:
    """The champion with a language model and adapters, in force."""
    store = Store(uri)
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    tokenizer = train_tokenizer([*titles, *asked_templates()] * 5, titles, [], 600)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=512), tokenizer)
    _leave_words_alone(folder)
    lm = Models(store).add("lm", folder, "untrained", OF_LM)
    releases = Releases(store)
    champion = releases.named("champion")
    assert champion is not None
    recommender = find_model(Models(store), champion.recommender)
    adapters = {}
    for config in (*EXPLAINERS, INTERPRETER):
        made = store_untrained_adapter(uri, config, recommender, MODEL.width, folder)
        adapters[made.name] = made.hash
    ranker = store_untrained_ranker(uri, RANKER, folder)
    adapters[ranker.name] = ranker.hash
    writer = store_untrained_writer(uri, WRITER, folder)
    adapters[writer.name] = writer.hash
    release = releases.add(Release(champion.recommender, lm.hash, adapters, champion.catalogue))
    releases.point("champion", release)
    publish(uri, "2026-01-05")
    return release


def _leave_words_alone(folder: Path) -> None:
    """What is no word gets logits of 0, and so hardly ever has a say: random weights would answer in broken bytes."""
    backbone = load_backbone(str(folder), device="cpu")
    weights = load_file(folder / "model.safetensors")
    texts = backbone.tokenizer.batch_decode([[token] for token in range(len(weights["model.embed_tokens.weight"]))])
    other = [token for token, text in enumerate(texts) if not text.strip().isalnum()]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name][other] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
