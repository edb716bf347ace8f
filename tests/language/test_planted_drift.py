"""What "Lately" finds of tastes that were planted to change, by the exact counts that the reference summaries are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq
import pytest

from raypipe.data.synthetic import SyntheticConfig
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.metrics.text import Vocabulary

BLOCK, WINDOW = 5, 50
PROMPTS = SummaryPrompts()


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[set[str], set[str]]]:
    """Of users whose tastes changed two to four blocks ago: what the summary calls new, and the genres that are."""
    folder: Path = tmp_path_factory.mktemp("drift")
    data = SyntheticConfig(users=20_000, items=800, events=1_200_000, drift_share=1.0).write(folder)
    items = arrow_csv.read_csv(data.items, parse_options=arrow_csv.ParseOptions(newlines_in_values=True)).to_pydict()
    genres = [{"genre": text.split("|")} for text in items["genres"]]
    vocabulary = Vocabulary(genre for item in genres for genre in item["genre"])
    log, truth = pq.read_table(data.log), pq.read_table(data.truth).to_pylist()
    user, item, time = (log[name].to_numpy() for name in ("user_id", "item_id", "time"))
    order = np.lexsort((time, user))
    user, item, time = user[order], item[order], time[order]
    place = {number: at for at, number in enumerate(items["item_id"])}
    bounds = np.searchsorted(user, np.arange(user[-1] + 2))
    found = []
    for told in truth:
        mine = slice(bounds[told["user_id"]], bounds[told["user_id"] + 1])
        after = int((time[mine] >= told["drift_time"]).sum())
        new = set(told["genres_after"]) - set(told["genres_before"])
        if len(item[mine]) >= WINDOW and 2 * BLOCK <= after <= 4 * BLOCK and new:
            window = [genres[place[number]] for number in item[mine][-WINDOW:].tolist()]
            summary = PROMPTS.reference_merge([window[at : at + BLOCK] for at in range(0, WINDOW, BLOCK)])
            found.append((set(vocabulary.named_lately(summary)), new))
    return found


def test_a_planted_change_is_called_new_far_more_often_than_chance_would(
    claims: list[tuple[set[str], set[str]]],
) -> None:
    assert len(claims) > 60
    hits = np.mean([bool(lately & new) for lately, new in claims])
    others = np.mean([bool(lately & claims[at - 1][1]) for at, (lately, _) in enumerate(claims)])
    assert hits > 0.7
    assert others < 0.3
