"""A prompt that kills or hangs whatever reads it: its user is rejected, and nobody else notices."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from raypipe.engines.engine import EngineConfig
from raypipe.pipeline.summarize import SummarizeConfig
from raypipe.storage.ledger import MAX_DEATHS
from tests.chaos.conftest import CleanNights
from tests.chaos.nights import USERS, Published, unbalanced
from tests.prompts import block_prompts

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


@pytest.mark.parametrize("does", ["kills", "hangs"])
def test_a_deadly_prompt_costs_its_user_alone(clean: CleanNights, tmp_path: Path, does: str) -> None:
    expected = clean.first.published
    config = SummarizeConfig(workspace=clean.first.command.workspace, engine=EngineConfig(engine="echo"))
    prompts = block_prompts(config, [f"user {n}" for n in range(USERS)])
    poisoned = "user 123"
    crc = zlib.crc32(prompts[poisoned][2].text.encode())
    assert Counter(zlib.crc32(prompt.text.encode()) for mine in prompts.values() for prompt in mine)[crc] == 1
    command = clean.again(0, str(tmp_path / "workspace"), tmp_path / "output")
    command = replace(command, words=(*command.words, "--cluster.stall_s", "5"))
    submission = command.submit(f"prompt {does} {crc}")
    assert submission.wait() == 0, submission.log()
    found = Published.of(command.workspace)
    assert unbalanced(command.workspace) == []
    for name in ("items", "histories", "logs"):
        assert found.tables[name] == expected.tables[name]
    for name in ("summaries", "block_summaries"):
        others = {place: row for place, row in expected.tables[name].items() if row["user_id"] != poisoned}
        assert found.tables[name] == others
    added = [row for place, row in found.tables["rejects"].items() if place not in expected.tables["rejects"]]
    assert len(found.tables["rejects"]) == len(expected.tables["rejects"]) + 1
    assert [(row["reason"], row["key"]) for row in added] == [("worker_died", poisoned)]
    assert f"{MAX_DEATHS} times with it alone" in added[0]["message"]
