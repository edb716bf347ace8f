"""Lists that LANCER writes for `recommend`: a user for whom nothing is written is rejected, told why, and has no row."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.pipeline.lancer_lists import Writer, WrittenLists
from raypipe.recommenders.windows import Histories
from raypipe.systems.lancer import LancerConfig, LancerPrompts
from raypipe.systems.lancer_lists import load_writer
from tests.conftest import Run
from tests.made import make_ready, retell
from tests.pipeline.small_logs import CHAIN_ITEMS, CHAIN_USERS, chain_events, newest
from tests.systems.lancer_world import prepared
from tests.untrained import store_untrained_writer

LONG = " ".join(["Endless"] * 200)


def save_lm(folder: Path, titles: list[str]) -> Path:
    tokenizer = train_tokenizer([*titles, "title: genre: A person chose, oldest first: ->"] * 5, titles, [], 400)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=128), tokenizer)
    return folder


def test_a_list_that_is_not_written_is_no_row_and_tells_why(tmp_path: Path) -> None:
    """Of three users the second's last item does not fit a prompt, and the third's cannot be read as numbers."""
    titles = [*(f"Film {n}" for n in range(1, 12)), "Quixotic"]
    world = prepared(save_lm(tmp_path / "lm", titles), tmp_path / "made", reasoning=False, knowledge=False)
    world.trained(0)
    titles[10] = LONG
    catalogue = Catalogue(titles, [{}] * 12)
    writer = load_writer(world.config, catalogue, str(world.lm), world.adapter, 8, "cpu")
    backbone = writer.engine.backbone
    damaged = backbone.encode([" Quixotic"])[0][-1]

    def forgotten(_: torch.nn.Module, read: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        return embedded.masked_fill((read[0] == damaged)[..., None], math.nan)

    backbone.model.get_input_embeddings().register_forward_hook(forgotten)
    known, places = Histories(np.array([1, 11, 12, 2], np.int32), np.arange(1, 5)), np.array([0, 1, 2, 3])
    rows = WrittenLists(2, False, np.arange(13) > 0)
    made = rows.warm(Writer(writer), known, places, np.zeros(4, np.int64))
    assert made.rows["place"].to_pylist() == [0, 3]
    assert all(row["items"][0] > 0 and math.isfinite(row["scores"][0]) for row in made.rows.to_pylist())
    assert {place: reason for place, (reason, _) in made.failed.items()} == {1: "prompt_too_long", 2: "not_finite"}
    assert "choose float32" in made.failed[2][1]
    nobody = rows.warm(Writer(writer), known, places[1:2], np.zeros(1, np.int64))
    assert (nobody.rows.num_rows, list(nobody.failed)) == (0, [1])


@pytest.mark.usefixtures("ray_cluster")
def test_who_cannot_be_asked_is_counted_as_rejected(raypipe: Run, tmp_path: Path) -> None:
    uri = str(tmp_path / "workspace")
    make_ready(uri)
    last = {user: item for user, item, _ in chain_events()}
    unread = {user for user, item in last.items() if item == last["u3"]}
    retell(uri, {last["u3"]: {"title": LONG}})
    line = LancerPrompts(line="{title}")
    config = LancerConfig(shown=2, reads=2, virtual_tokens=2, beams=2, text_characters=0, prompts=line)
    lm = save_lm(tmp_path / "lm", [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)])
    store_untrained_writer(uri, config, lm)
    ended = raypipe("recommend", "--workspace", uri, "--model", "lancer", "--length", 2, "--answer_tokens", 8)
    assert ended.code == 0, ended.stderr
    assert (ended.metrics["computed"], ended.metrics["rejected"]) == (CHAIN_USERS - len(unread), len(unread))
    rows = [row for row in newest(uri, "recommendations").to_pylist() if row["variant"] == "recommend-lancer"]
    assert {row["user_id"] for row in rows} == {f"u{n}" for n in range(CHAIN_USERS)} - unread
    rejects = newest(uri, "rejects").to_pylist()
    told = {(row["table"], row["key"], row["reason"]) for row in rejects}
    assert told == {("recommendations", user, "prompt_too_long") for user in unread}
