"""Interaction logs: the driver opens and checks them, and the workers read them by splits.

Formats: MovieLens in every layout, CSV (also .gz), JSON lines (also .gz), Parquet, Delta; on this machine or on S3.
Text is UTF-8, lines end in \\n or \\r\\n, and a .gz file is one split. Events keep their place in the log (`seq`):
files in the order of their names, then byte (text) or row (Parquet).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import pyarrow as pa

from raypipe.config import Config, free, shaping
from raypipe.data import casting
from raypipe.data.columnar import delta_files, parquet_files
from raypipe.data.events import EventRules
from raypipe.data.files import FoundFile, checksum, find_files, resolve
from raypipe.data.formats import (
    Format,
    Part,
    columnar_part,
    delimited_part,
    detect_format,
    headless_part,
    json_part,
    json_sample,
)
from raypipe.data.jsonlines import JsonType, json_types
from raypipe.data.lines import RawRows
from raypipe.data.movielens import find_layout
from raypipe.data.splits import LogSplit, read_rows
from raypipe.errors import UsageError

_SAMPLE_ROWS = 1000
_SAMPLE_BLOCK_BYTES = 256 << 10
# If the first 4 MiB or the first 16 files hold no usable row, the log is not searched further.
_SAMPLE_PIECES = 16
# 1e11 seconds is the year 5138; 1e11 milliseconds is 1973.
_FIRST_MILLISECONDS = 1e11


class LogColumns(Config):
    """Which columns of the log hold what. Exactly one of `time` and `order` must be set; MovieLens knows its own."""

    user: str = shaping("user_id", "the user's id")
    item: str = shaping("item_id", "the item's id")
    time: str | None = shaping(None, "when it happened")
    order: str | None = shaping(None, "the event's place in its user's history, where no time is known")
    rating: str | None = shaping(None, "a number, compared with min_rating")
    event: str | None = shaping(None, "the event's type, looked up in event_weights")


class LogConfig(Config):
    """An interaction log and what its columns mean."""

    path: str = free(description="file, folder or glob of parts, or s3:// URI")
    format: Format = shaping("auto", "auto: told from names and first bytes")
    columns: LogColumns = shaping(LogColumns)
    time_unit: Literal["auto", "seconds", "milliseconds", "iso"] = shaping(
        "auto", "auto: ISO text and timestamps → iso; numbers above 1e11 → milliseconds; judged by the first rows"
    )
    event_weights: dict[str, float] = shaping(dict, "event type → weight; 0 leaves such events out")
    min_rating: float | None = shaping(None, "events rated lower are left out and counted as filtered")
    delimiter: str | None = shaping(None, "of CSV; unset: a comma, or a tab in .tsv files", min_length=1, max_length=1)
    quoted_newlines: bool = shaping(False, "CSV fields may hold line breaks in quotes; each file is then one split")
    split_bytes: int = free(12 << 20, "about how much of the log one split holds", gt=0)


@dataclass(frozen=True)
class Log:
    """An opened log. `checksum` is a checksum of its content (see `open_log`)."""

    uri: str
    kind: Literal["time", "order"]
    checksum: str
    splits: list[LogSplit]


def open_log(config: LogConfig) -> Log:
    """Find the log's files, format, columns, time unit and splits. Only its first rows and its checksum are read.

    The checksum is the SHA-256 of a local file, or etag and size on S3. For a Delta table it is a hash of the names and
    sizes of its (immutable) files at the version found now; for several files, the hash of their list. Raises
    UsageError, before any work, if there is nothing to read, if a column is missing or has an impossible type, if there
    is no row, or if the config contradicts itself.
    """
    path = resolve(config.path)
    _check_weights(config)
    format_ = detect_format(path, "ratings") if config.format == "auto" else config.format
    rules = _movielens_rules(config, path) if format_ == "movielens" else _rules(config)
    parts, types = _parts(config, format_, path, rules)
    for part in parts:
        _check_columns(part, config, rules)
    # Whole files are sampled, so that the size of splits does not influence what the times mean.
    files = _splits(parts, rules, types, whole=True)
    sample = list(islice(_first_rows(files), _SAMPLE_PIECES))
    if not any(raw.table.num_rows or raw.rejects for raw in sample):
        raise UsageError(f"The log {path} has no rows.", "Check that it is the right file and that it was written.")
    _check_line_breaks(files[0], sample[0])
    if rules.time is not None and rules.time_unit is None:
        rules = replace(rules, time_unit=_judge_time_unit(sample, rules.time, path))
    kind: Literal["time", "order"] = "order" if rules.time is None else "time"
    return Log(path, kind, _sum(format_, parts), _splits(parts, rules, types))


def _splits(
    parts: list[Part], rules: EventRules, types: dict[str, JsonType] | None, whole: bool = False
) -> list[LogSplit]:
    """The splits of all parts, in order. With `whole`, one split a part."""
    splits: list[LogSplit] = []
    seq = 0
    for part in parts:
        ranges = part.ranges
        if whole and ranges:
            ranges = [(ranges[0][0], ranges[-1][1], ranges[0][2])]
        for start, end, position in ranges:
            split = LogSplit(len(splits), part.file.uri, part.file.name, part.reader, start, end, position, seq, rules)
            splits.append(replace(split, dialect=part.dialect, types=types, constants=part.constants))
        seq += part.length
    return splits


def _rules(config: LogConfig) -> EventRules:
    columns = config.columns
    if (columns.time is None) == (columns.order is None):
        both = "both log.columns.time and log.columns.order are" if columns.time else "neither is"
        raise UsageError(
            f"A log is ordered by time or by an order column, and {both} set for {config.path}.",
            "Set exactly one of log.columns.time and log.columns.order to a column of the log.",
        )
    if config.min_rating is not None and columns.rating is None:
        raise UsageError("log.min_rating is set, but no rating column.", "Set log.columns.rating, or drop min_rating.")
    if (columns.event is None) != (not config.event_weights):
        raise UsageError(
            "log.columns.event and log.event_weights belong together, and one of them is not set.",
            "Name the column of the event types and a weight for each type, or neither.",
        )
    unit = None if config.time_unit == "auto" or columns.time is None else config.time_unit
    return EventRules(
        columns.user,
        columns.item,
        columns.time,
        columns.order,
        columns.rating,
        columns.event,
        unit,
        config.event_weights,
        config.min_rating,
    )


def _movielens_rules(config: LogConfig, path: str) -> EventRules:
    found = find_layout(find_files(path), "ratings")
    if found is None:
        raise UsageError(
            f"There is no MovieLens log at {path}.", "It needs u.data, ratings.dat, or ratings.csv as published."
        )
    if config.columns != LogColumns() or config.event_weights or config.time_unit not in ("auto", "seconds"):
        raise UsageError(
            f"{path} is MovieLens, whose columns, event types and time unit are known.",
            "Leave log.columns, log.event_weights and log.time_unit out, or set log.format: csv and name the file.",
        )
    layout = found[0]
    return EventRules(layout.user, layout.item, "timestamp", None, "rating", None, "seconds", {}, config.min_rating)


def _check_weights(config: LogConfig) -> None:
    for name, weight in config.event_weights.items():
        if not (np.isfinite(weight) and weight >= 0):
            raise UsageError(f"The weight of event type {name} is {weight}.", "Weights are 0 (left out) or greater.")


def _parts(
    config: LogConfig, format_: Format, path: str, rules: EventRules
) -> tuple[list[Part], dict[str, JsonType] | None]:
    """The log's files, and for JSON lines the type of each column."""
    size = config.split_bytes
    if format_ == "delta":
        return [columnar_part(file, size) for file in delta_files(path)], None
    if format_ == "parquet":
        return [columnar_part(file, size) for file in parquet_files(path)], None
    files = find_files(path)
    if format_ == "jsonl":
        sample = json_sample(files)
        names = sorted({name for row in sample for name in row})
        exact = [name for name in (rules.user, rules.item, rules.event) if name is not None]
        numbers = [name for name in rules.columns if name not in exact]
        # Without any object no column can be missing. Such a log is reported as empty or broken later.
        parts = [json_part(file, names or rules.columns, size) for file in files if file.size_bytes]
        return parts, json_types(sample, exact, numbers)
    if format_ == "movielens":
        found = find_layout(files, "ratings")
        assert found is not None
        layout, file = found
        if layout.dialect is not None:
            return [headless_part(file, layout.dialect, size)], None
        files = [file]
    delimited = [delimited_part(file, config.delimiter, config.quoted_newlines, size) for file in files]
    return [part for part in delimited if part is not None], None


def _check_columns(part: Part, config: LogConfig, rules: EventRules) -> None:
    for name in rules.columns:
        if name not in part.columns:
            raise _missing_column(name, part, config)
        if part.columns.count(name) > 1:
            raise UsageError(f"{part.file.uri} has several columns {name}.", "Rename all but the one that is meant.")
        if part.schema is not None and name in part.schema.names:
            _check_type(name, casting.value_type(part.schema.field(name).type), part.file, rules)


def _missing_column(name: str, part: Part, config: LogConfig) -> UsageError:
    folded = {column.casefold(): column for column in part.columns}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    meant = f" The closest is {folded[close[0]]}." if close else ""
    shown = ", ".join(part.columns[:50])
    hint = ""
    if part.dialect is not None and len(part.columns) == 1 and any(sign in shown for sign in "\t;|"):
        hint = " Its lines seem to be split by another delimiter: set log.delimiter."
    return UsageError(
        f"{part.file.uri} has no column {name}; it has: {shown}.{meant}",
        f"Set log.columns to the names the log uses.{hint}",
    )


def _check_type(name: str, type_: pa.DataType, file: FoundFile, rules: EventRules) -> None:
    text, number = casting.is_text(type_), casting.is_number(type_)
    fits = text or number
    expected = "text or numbers"
    if name == rules.time:
        fits = text or casting.is_time(type_) or (number and rules.time_unit != "iso")
        expected = "timestamps or ISO text" if rules.time_unit == "iso" else "timestamps, numbers or text"
    if not fits and not pa.types.is_null(type_):
        raise UsageError(f"Column {name} of {file.uri} is of type {type_}.", f"It has to hold {expected}.")


def _first_rows(splits: list[LogSplit]) -> Iterator[RawRows]:
    """Yield the first rows, block by block, until enough rows became columns."""
    rows = 0
    for split in splits:
        for raw in read_rows(split, block_bytes=_SAMPLE_BLOCK_BYTES, batch_rows=_SAMPLE_ROWS):
            yield raw
            rows += raw.table.num_rows
            if rows >= _SAMPLE_ROWS:
                return


def _check_line_breaks(file: LogSplit, first: RawRows) -> None:
    """Raise UsageError for a CSV file whose first lines are broken, but are whole if quotes may hold line breaks."""
    if not first.rejects or file.dialect is None or not file.dialect.quoting or file.dialect.quoted_newlines:
        return
    quoted = replace(file, dialect=replace(file.dialect, quoted_newlines=True))
    if not next(read_rows(quoted, block_bytes=_SAMPLE_BLOCK_BYTES)).rejects:
        raise UsageError(
            f"{file.uri} has fields with line breaks in quotes, so its lines are not its rows.",
            "Set log.quoted_newlines: true (each file is then read by one worker).",
        )


def _judge_time_unit(sample: list[RawRows], column: str, path: str) -> Literal["seconds", "milliseconds", "iso"]:
    for raw in sample:
        values = casting.flat(raw.table.column(column).slice(0, _SAMPLE_ROWS))
        if casting.is_time(values.type):
            return "iso"
        numbers = casting.to_numbers(values)
        _, unreadable, _ = casting.to_milliseconds(values, "iso")
        read_as_numbers, read_as_iso = int((~numbers.missing).sum()), int((~unreadable).sum())
        if read_as_iso > read_as_numbers:
            return "iso"
        if read_as_numbers:
            middle = float(np.median(np.abs(numbers.as_floats()[~numbers.missing])))
            return "milliseconds" if middle > _FIRST_MILLISECONDS else "seconds"
    raise UsageError(
        f"No time in the first rows of {path} (column {column}) is a number or ISO text, so its unit cannot be told.",
        "Check log.columns.time, or set log.time_unit to seconds, milliseconds or iso.",
    )


def _sum(format_: Format, parts: list[Part]) -> str:
    if format_ == "delta":
        names = "\n".join(f"{part.file.name}\t{part.file.size_bytes}" for part in parts)
        return hashlib.sha256(names.encode()).hexdigest()
    return checksum([part.file for part in parts])


def is_movielens(config: LogConfig) -> bool:
    """Whether the log has one of MovieLens's own layouts, which include a catalogue."""
    if config.format != "auto":
        return config.format == "movielens"
    return detect_format(resolve(config.path), "ratings") == "movielens"
