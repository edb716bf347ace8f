"""Candidate sets of a workspace: drawn once for a cut, stored, and read by whatever ranks them.

`candidates/<key>.parquet` has a row for each user: `user_key` (int64, the stable hash of the id), `items` (catalogue
indices, the chosen item among them) and `place`, the position of the chosen item. The key is a hash of the draw's
options, the cut, the number of items and everybody's history, so that whatever changes a set also changes its name.
`forget` deletes all sets, and no set is stored with a user who was forgotten while it was drawn.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.data.candidates import CandidateSets, candidate_sets, history_seeds
from raypipe.pipeline.forgotten import forgotten_keys, locked_traces
from raypipe.pipeline.sequences import histories_hash, user_keys
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import digest_lanes
from raypipe.storage.locks import LEASE_S
from raypipe.storage.workspace import Workspace
from raypipe.systems.trsr import CandidateOptions

FOLDER = "candidates"
STEP_VERSION = 1
_BEFORE = 2  # least number of events before the cut
_SCHEMA = pa.schema([("user_key", pa.int64()), ("items", pa.list_(pa.int32())), ("place", pa.int32())])


def stored_candidates(
    workspace: Workspace, versions: dict[str, int], hold_out: int, options: CandidateOptions
) -> tuple[str, CandidateSets]:
    """The key of the candidate sets, and the sets. They are drawn and stored unless they are stored already.

    There is a set for every user who has two events before the last `hold_out` and leaves enough items unseen. The item
    asked for is the first of these last events. None of the other candidates is in the user's whole history.
    """
    key = fingerprint(
        {
            "step": STEP_VERSION,
            "options": options.shaping_values(),
            "hold_out": hold_out,
            "histories": histories_hash(workspace, versions["histories"]),
            "items": workspace.tables["items"].rows(versions["items"]),
        }
    )
    path = f"{FOLDER}/{key}.parquet"
    if (data := workspace.store.get(path)) is None:
        sets = _drawn(workspace, versions, hold_out, options)
        columns = [sets.keys, pa.array(list(sets.items), _SCHEMA.field("items").type), sets.places.astype(np.int32)]
        file = io.BytesIO()
        pq.write_table(pa.table(columns, schema=_SCHEMA), file)
        with locked_traces(workspace, "align", LEASE_S):
            # Nobody will ask again for histories that contain a user who was forgotten meanwhile.
            if not np.isin(sets.keys, forgotten_keys(workspace)).any():
                workspace.store.create(path, file.getvalue())
        return key, sets
    rows = pq.read_table(io.BytesIO(data), schema=_SCHEMA)
    items = rows["items"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, options.negatives + 1)
    return key, CandidateSets(rows["user_key"].to_numpy(), items, rows["place"].to_numpy().astype(np.int64))


def _drawn(workspace: Workspace, versions: dict[str, int], hold_out: int, options: CandidateOptions) -> CandidateSets:
    rows = workspace.tables["histories"].read(versions["histories"], ["user_id", "items", "history_key"])
    rows = rows.sort_by("user_id").combine_chunks()
    lengths = rows["items"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    asked = lengths >= _BEFORE + hold_out
    rows, lengths = rows.filter(pa.array(asked)), lengths[asked]
    users = rows["user_id"].combine_chunks()
    seen = rows["items"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    keys = user_keys(users)
    seeds = history_seeds(keys.view(np.uint64), digest_lanes(rows["history_key"].combine_chunks()), options.seed)
    targets = seen[lengths.cumsum() - hold_out]
    items = workspace.tables["items"].rows(versions["items"])
    return candidate_sets(keys, seeds, targets, seen, lengths, items, options.negatives)[0]
