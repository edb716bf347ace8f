"""MovieLens as GroupLens publishes it: 100K, 1M and 10M, and the CSV layout (latest, 20M, 25M, 32M).

A layout is recognised by its file names. Titles of 100K and 1M are latin-1. The year is the "(1995)" at the end of a
title, which stays in the title. "unknown" and "(no genres listed)" do not count as genres.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raypipe.data.delimited import Dialect
from raypipe.data.files import FoundFile, explained, open_stream
from raypipe.data.rejects import Reject, line_json

# The order of the 19 flags at the end of a line of u.item.
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

_NO_GENRES = {"unknown", "(no genres listed)", ""}
_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True)
class Movie:
    """A line of an items file. `position` is its byte in the file."""

    position: int
    item_id: str
    title: str
    genres: list[str]
    year: int | None


@dataclass(frozen=True)
class Layout:
    """One layout in which MovieLens is published. `dialect` is None if the ratings file has a header."""

    ratings: str
    items: str
    dialect: Dialect | None
    user: str
    item: str
    parse_item: Callable[[str], tuple[str, str, list[str]]]


def find_layout(files: list[FoundFile], part: str) -> tuple[Layout, FoundFile] | None:
    """The layout that the file names match, with its file for `part` ("ratings" or "items"); None if none matches."""
    for layout in LAYOUTS:
        name = layout.ratings if part == "ratings" else layout.items
        for file in files:
            if file.name == name and (layout.dialect is not None or _has_movielens_header(file)):
                return layout, file
    return None


def read_movies(layout: Layout, file: FoundFile) -> Iterator[Movie | Reject]:
    """Yield the movies of an items file, line by line (32M has 87,585 and takes a second).

    An invalid line yields a Reject.
    """
    with explained(file.uri), open_stream(file.uri) as stream:
        content = stream.read()
    at = 0
    for number, line in enumerate(content.split(b"\n")):
        position, at = at, at + len(line) + 1
        if not line.strip() or (number == 0 and layout.dialect is None):
            continue
        try:
            item_id, title, genres = layout.parse_item(_decode(line.rstrip(b"\r")))
        except (ValueError, csv.Error):
            message = f"the line does not have the columns of {layout.items}"
            yield Reject(position, "malformed_row", message, line_json(line))
            continue
        year = _YEAR.search(title)
        kept = [genre for genre in genres if genre not in _NO_GENRES]
        yield Movie(position, item_id, title, kept, int(year.group(1)) if year else None)


def _decode(line: bytes) -> str:
    # 10M has the layout of 1M but is UTF-8. Latin-1 text with a letter beyond ASCII is hardly ever valid UTF-8.
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _has_movielens_header(file: FoundFile) -> bool:
    with explained(file.uri), open_stream(file.uri) as stream:
        header = stream.read(64).removeprefix(b"\xef\xbb\xbf")
    return header.startswith((b"userId,movieId,rating,timestamp", b"movieId,title,genres"))


def _parse_u_item(line: str) -> tuple[str, str, list[str]]:
    # Split from the right, because a title may hold a pipe. Release dates and the address between title and flags are
    # dropped.
    start, _release, _video, _url, *flags = line.rsplit("|", 3 + len(GENRES_100K))
    item_id, title = start.split("|", 1)
    if len(flags) != len(GENRES_100K) or not set(flags) <= {"0", "1"}:
        raise ValueError
    return item_id, title, [genre for genre, flag in zip(GENRES_100K, flags, strict=True) if flag == "1"]


def _parse_movies_dat(line: str) -> tuple[str, str, list[str]]:
    item_id, rest = line.split("::", 1)
    title, genres = rest.rsplit("::", 1)
    return item_id, title, genres.split("|")


def _parse_movies_csv(line: str) -> tuple[str, str, list[str]]:
    ((item_id, title, genres),) = csv.reader(io.StringIO(line), strict=True)
    return item_id, title, genres.split("|")


_RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")

LAYOUTS = (
    Layout("u.data", "u.item", Dialect(_RATING_COLUMNS, "\t", False), "user_id", "item_id", _parse_u_item),
    Layout("ratings.dat", "movies.dat", Dialect(_RATING_COLUMNS, "::", False), "user_id", "item_id", _parse_movies_dat),
    Layout("ratings.csv", "movies.csv", None, "userId", "movieId", _parse_movies_csv),
)
