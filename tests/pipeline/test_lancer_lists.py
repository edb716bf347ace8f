"""Lists that LANCER writes for `recommend`: a user for whom nothing is written is rejected, told why, and has no row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.systems.lancer import LancerConfig, LancerPrompts
from raypipe.systems.lancer_lists import load_writer
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.made import make_ready, retell
from tests.pipeline.small_logs import CHAIN_ITEMS, CHAIN_USERS, chain_events, newest
from tests.systems.lancer_world import prepared
from tests.untrained import store_untrained_writer

LONG = " ".join(["Endless"] * 200)


def save_lm(folder: Path, titles: list[str]) -> Path:
    tokenizer = train_tokenizer([*titles, "title: genre: A person chose, oldest first: ->"] * 5, titles, [], 400)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=128), tokenizer)
    return folder


def store_writer(uri: str, folder: Path) -> None:
    """An untrained LANCER of a workspace of the chains."""
    line = LancerPrompts(line="{title}")
    config = LancerConfig(shown=2, reads=2, virtual_tokens=2, beams=2, text_characters=0, prompts=line)
    store_untrained_writer(uri, config, save_lm(folder, [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]))


def written_rows(uri: str) -> list[dict[str, Any]]:
    return [row for row in newest(uri, "recommendations").to_pylist() if row["variant"] == "recommend-lancer"]


def test_a_list_that_is_not_written_tells_why(tmp_path: Path) -> None:
    """Of four users the second's last item does not fit a prompt, and the third's cannot be read as numbers."""
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
    written = writer.lists([[1], [11], [12], [2]], filter_seen=False)
    assert [len(items) > 0 for items in written.items] == [True, False, False, True]
    assert all(math.isfinite(logprobs[0]) for logprobs in (written.logprobs[0], written.logprobs[3]))
    errors = [outcome.error for outcome in written.outcomes]
    assert [error and error.kind for error in errors] == [None, "prompt_too_long", "not_finite", None]
    assert errors[2] is not None
    assert "choose float32" in errors[2].message
    assert writer.lists([[11]]).items == [[]]


@pytest.mark.usefixtures("ray_cluster")
def test_who_cannot_be_asked_is_counted_as_rejected(raypipe: Run, tmp_path: Path) -> None:
    uri = str(tmp_path / "workspace")
    make_ready(uri)
    last = {user: item for user, item, _ in chain_events()}
    unread = {user for user, item in last.items() if item == last["u3"]}
    retell(uri, {last["u3"]: {"title": LONG}})
    store_writer(uri, tmp_path / "lm")
    words = ("recommend", "--workspace", uri, "--model", "lancer", "--length", 2, "--answer_tokens", 8)
    ended = raypipe(*words)
    assert ended.code == 0, ended.stderr
    assert (ended.metrics["computed"], ended.metrics["rejected"]) == (CHAIN_USERS - len(unread), len(unread))
    rows = written_rows(uri)
    assert {row["user_id"] for row in rows} == {f"u{n}" for n in range(CHAIN_USERS)} - unread
    named = [(item, score) for row in rows for item, score in zip(row["items"], row["scores"], strict=True) if item]
    assert named
    assert all(score < 0 and math.isfinite(score) for _, score in named)
    assert ended.result["cost"]["calls"] == CHAIN_USERS
    assert ended.result["cost"]["tokens_in"] > ended.result["cost"]["calls"]
    rejects = newest(uri, "rejects").to_pylist()
    told = {(row["table"], row["key"], row["reason"]) for row in rejects}
    assert told == {("recommendations", user, "prompt_too_long") for user in unread}


@pytest.mark.usefixtures("ray_cluster")
def test_caps_hold_and_the_rest_is_written_by_the_next_run(raypipe: Run, tmp_path: Path) -> None:
    uri = str(tmp_path / "workspace")
    make_ready(uri)
    store_writer(uri, tmp_path / "lm")
    words = ("recommend", "--workspace", uri, "--model", "lancer", "--length", 2, "--answer_tokens", 8)
    capped = raypipe(*words, "--max_calls", 7, "--micro_batch", 4)
    assert capped.code == 0, capped.stderr
    assert (capped.result["cost"]["calls"], capped.metrics["computed"]) == (7, 7)
    assert capped.metrics["capped"] == CHAIN_USERS - 7
    assert f"left {CHAIN_USERS - 7} users for the next run" in capped.stderr
    first = {row["user_id"]: row["items"] for row in written_rows(uri)}
    late = raypipe(*words, "--deadline", "2020-01-01T00:00:00Z")
    assert (late.status, late.result["cost"]["calls"], late.metrics["capped"]) == (
        "nothing_to_do",
        0,
        CHAIN_USERS - 7,
    )
    rest = raypipe(*words, "--price_out", 1e6)
    assert (rest.metrics["computed"], rest.metrics["unchanged"]) == (CHAIN_USERS - 7, 7)
    assert rest.result["cost"]["money"] == rest.result["cost"]["tokens_out"] > 0
    lists = {row["user_id"]: row["items"] for row in written_rows(uri)}
    assert lists.keys() == {f"u{n}" for n in range(CHAIN_USERS)}
    assert first.items() <= lists.items()
    # A user may take a prompt of the whole context, and a line of eight tokens for each of two beams.
    tight = [raypipe(*words, "--length", 1, "--max_tokens", 128 + most).result["cost"]["calls"] for most in (15, 16)]
    assert tight[0] == 0 < tight[1]


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_can_ask_nobody_stops_the_job(raypipe: Run, tmp_path: Path) -> None:
    uri = str(tmp_path / "workspace")
    make_ready(uri)
    retell(uri, {f"i{n}": {"title": LONG} for n in range(1, CHAIN_ITEMS + 1)})
    store_writer(uri, tmp_path / "lm")
    words = ("recommend", "--workspace", uri, "--model", "lancer", "--length", 2, "--answer_tokens", 8)
    stopped = raypipe(*words)
    assert stopped.code == 1
    assert "rows were rejected, more than max_reject_rate 20%. prompt_too_long: " in one_paragraph(stopped.stderr)
    assert written_rows(uri) == []
    ended = raypipe(*words, "--max_reject_rate", 1)
    assert (ended.code, ended.metrics["rejected"]) == (0, CHAIN_USERS), ended.stderr
