"""People whose next item is of the kind of their first, and language models that rank candidates for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raypipe.data.candidates import CandidateSets, candidate_sets
from raypipe.language.backbone import Backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.recommenders.windows import Histories
from raypipe.storage.hashing import mix
from raypipe.systems.trsr import Trsr, TrsrConfig
from raypipe.systems.trsr_past import Past, PastSummaries

KINDS = ("dark", "funny", "grim", "sweet")
PLAIN, PER_KIND = 20, 20
ITEMS = PLAIN + PER_KIND * len(KINDS)
USERS, EVENTS = 160, 8
TERSE = "likes {summary} now {recent} next {candidate} ?"
FULL = {"lora": None, "full": True}


def titles() -> list[str]:
    return [f"plain {n}" for n in range(PLAIN)] + [f"{kind} {n}" for kind in KINDS for n in range(PER_KIND)]


def histories() -> Histories:
    """Two items of one kind, five plain ones that tell nothing, and one of the kind again."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        kind = 1 + PLAIN + user % len(KINDS) * PER_KIND + rng.choice(PER_KIND, 3, replace=False)
        rows.append(np.concatenate([kind[:2], 1 + rng.choice(PLAIN, 5, replace=False), kind[2:]]))
    return Histories(np.concatenate(rows).astype(np.int32), np.arange(1, USERS + 1) * EVENTS, np.arange(USERS) * 977)


def summaries(events: int) -> PastSummaries:
    return PastSummaries({row: [(events, KINDS[row % len(KINDS)])] for row in range(USERS)})


def past(known: PastSummaries, hold_out: int = 0) -> Past:
    """The last quarter of the users is held out."""
    held_out = np.arange(USERS) >= 3 * USERS // 4
    return Past(histories().without_last(hold_out), held_out, Catalogue(titles(), [{}] * ITEMS), known)


def save_lm(folder: Path) -> str:
    """An untrained language model that has the words of it all."""
    words = [*titles(), TERSE, TrsrConfig().prompt, " yes no NULL title:", *KINDS]
    tokenizer = train_tokenizer([" ".join(words)] * 5, [*KINDS, "yes", "no"], [], 900)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=512), tokenizer)
    return str(folder)


def trsr(backbone: Backbone, known: Past, context: int = 512, **options: object) -> Trsr:
    return Trsr(TrsrConfig.model_validate({"prompt": TERSE, **options}), known, backbone, context)


def learnt(system: Trsr, positions: int = 3, left: int = 0, seed: int = 0) -> list:
    return list(system.examples(USERS, positions, left, np.random.default_rng(seed)))


def asked(system: Trsr, rows: Sequence[int]) -> CandidateSets:
    """The last item of whole histories among twenty others."""
    chosen, whole = np.array(rows), histories()
    seen = whole.take(whole.starts[chosen], whole.lengths[chosen])
    targets = whole.items[whole.ends[chosen] - 1]
    return candidate_sets(chosen, mix(chosen.astype(np.uint64)), targets, seen.items, seen.lengths, ITEMS, 20)[0]
