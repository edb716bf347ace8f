"""The lists of attributes for clothing and games, on made-up catalogues: every item and user is scored on all of a list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.recommenders.attribute_scores import load_scores
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.systems.guided import GuidedConfig, Rating
from raypipe.systems.guided_attributes import find_attributes
from tests.conftest import Run
from tests.made import make_ready, retell
from tests.pipeline.small_logs import CHAIN_ITEMS, CHAIN_USERS

MADE_UP = {
    "clothing": {
        "coat": "Warm wool for deep frost.",
        "sandal": "Light straps for hot days.",
        "gown": "Silk for a gala.",
    },
    "games": {"puzzle": "No haste at all.", "shooter": "Split seconds throughout.", "saga": "As rich as a novel."},
}


@pytest.mark.parametrize("domain", sorted(MADE_UP))
def test_items_and_users_are_scored_on_all_of_a_list(raypipe: Run, tmp_path: Path, domain: str) -> None:
    uri, lm, kinds = str(tmp_path / "workspace"), tmp_path / "lm", list(MADE_UP[domain])
    make_ready(uri)
    told = [(f"{kinds[n % 3].title()} {n}", kinds[n % 3], MADE_UP[domain][kinds[n % 3]]) for n in range(CHAIN_ITEMS)]
    retell(
        uri,
        {
            f"i{n}": {"title": title, "attributes": [("kind", [kind])], "text": text}
            for n, (title, kind, text) in enumerate(told, 1)
        },
    )
    catalogue = Catalogue(
        [title for title, _, _ in told], [{"kind": [kind]} for _, kind, _ in told], [text for _, _, text in told]
    )
    rating = Rating(GuidedConfig(domain=domain), find_attributes(domain, catalogue, 10), catalogue)
    texts = [*rating.item_lines(), rating.item_prompt("").text, rating.user_prompt([]).text, *rating.words]
    tokenizer = train_tokenizer([*texts, "1 2 3 4 5 6 7 8 9 10"] * 3, [], [], 700)
    save_untrained(lm, BuiltinLmConfig(size="tiny", context=1024), tokenizer)
    words = ("--system", "guided", "--guided.domain", domain, "--no-guided.tuned", "--guided.history", 3)
    ended = raypipe("align", "--workspace", uri, "--lm", lm, *words, "--hold_out", 2, "--held_out_share", 0.25)
    assert (ended.code, ended.metrics["items"], ended.metrics["users"]) == (0, CHAIN_ITEMS, CHAIN_USERS), ended.stderr
    (model,) = Models(Store(uri)).all("guided")
    scores = load_scores(Store(uri).local_path(f"{model.folder}/checkpoint"), Models(Store(uri)).users(model))
    assert scores.names == tuple(one.name for one in find_attributes(domain, catalogue, 10))
    for table in (scores.items[1:], scores.users):
        assert table.shape[1] == 10
        assert ((table >= 1) & (table <= 10)).all()
    # What is said of them moves the scores: no two kinds are scored alike, and of one kind the titles alone differ.
    of_kind = [scores.items[1:][number::3].mean(0) for number in range(3)]
    assert all(np.abs(of_kind[one] - of_kind[other]).max() > 1e-4 for one, other in ((0, 1), (0, 2), (1, 2)))
