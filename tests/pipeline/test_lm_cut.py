"""What the language model is trained on ends before the cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.language.catalogue import Catalogue
from raypipe.language.instructions import InstructionConfig, histories_before_cut, summary_examples
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.pipeline.lm import LmOptions, training_histories
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.pipeline.small_logs import START, newest, random_events, write_catalogue, write_log

PLANTED = "The Title That Only The Future Holds"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("hold_out", [0, LmOptions().hold_out])
def test_a_planted_last_title_is_in_no_example_made_from_histories(
    raypipe: Run, files: Path, tmp_path: Path, hold_out: int
) -> None:
    titles = {f"i{n}": f"Title {n}" for n in range(1, 20)} | {"last": PLANTED}
    catalogue = write_catalogue(files / "items.csv", titles)
    events = random_events(7, 6, 19, 300)
    last = [(user, "last", START + 10**12) for user in {user for user, _, _ in events}]
    log = write_log(files / "log.csv", [*events, *last])
    uri = str(tmp_path / "workspace")
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    assert raypipe("ingest", "--workspace", uri, *words).status == "ok"
    workspace = Workspace(uri)
    histories = training_histories(workspace, workspace.tables["histories"].version(), 100)
    before = histories_before_cut(histories["items"].to_pylist(), hold_out)
    items = newest(uri, "items").sort_by("index")
    shown = Catalogue(items["title"].to_pylist(), [dict(pairs) for pairs in items["attributes"].to_pylist()])
    config = InstructionConfig(block_examples=400, merge_examples=50, update_examples=0, synthetic_share=0)
    text = "".join(
        example.prompt + example.answer for example in summary_examples(before, shown, SummaryPrompts(), config)
    )
    assert ("Title 3" in text, PLANTED in text) == (True, hold_out == 0)
