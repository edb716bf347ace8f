"""The items of the synthetic data set: genres, brands, series, popularity, and texts made from them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Each genre has phrases that only its items' texts use, so that a text reveals its genre.
GENRES: dict[str, tuple[str, ...]] = {
    "Adventure": ("a lost map", "a perilous crossing", "an uncharted island"),
    "Comedy": ("a string of mishaps", "a hopeless wedding", "two quarrelling neighbours"),
    "Crime": ("a flawless heist", "a crooked detective", "an unsolved robbery"),
    "Drama": ("a family divided", "a long farewell", "an old wound"),
    "Fantasy": ("a sleeping dragon", "a cursed crown", "an apprentice wizard"),
    "History": ("a fallen empire", "a forgotten queen", "letters from the front"),
    "Horror": ("a house that listens", "something in the cellar", "a village without mirrors"),
    "Music": ("a band on its last tour", "a violin of doubtful origin", "one perfect song"),
    "Mystery": ("a locked room", "a missing heiress", "a coded diary"),
    "Nature": ("wolves in winter", "the life of a river", "a desert in bloom"),
    "Romance": ("a summer by the sea", "love letters gone astray", "a second chance"),
    "Science Fiction": ("a silent starship", "an awakened machine", "a colony on the edge"),
    "Sport": ("the last match of the season", "an unlikely champion", "a coach with a past"),
    "Thriller": ("a ticking clock", "a witness on the run", "a double agent"),
    "War": ("a bridge to hold", "a patrol cut off", "a truce at midnight"),
    "Western": ("a dusty border town", "a stolen herd", "a duel at noon"),
}


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words(
    "Amber Ancient Bitter Blazing Broken Crimson Distant Drifting Electric Endless Fading Frozen Gentle Gilded Golden "
    "Hidden Hollow Iron Ivory Jade Last Lonely Lost Lucky Midnight Painted Paper Patient Quiet Restless Rising Savage "
    "Secret Seventh Shattered Silent Silver Sleeping Stolen Stubborn Sudden Tender Twisted Velvet Wandering Wild"
)
_NOUNS = _words(
    "Anchor Arrow Bell Bridge Candle Castle Compass Crown Dancer Door Engine Falcon Feather Fire Forest Garden Ghost "
    "Guitar Harbour Horizon Hour Island Key Lantern Letter Lighthouse Machine Mask Mirror Moon Mountain Ocean Orchard "
    "Passenger Promise River Rose Saint Shadow Ship Snow Song Star Stranger Thief Tiger Tower Train Voyage Winter"
)
_PLACES = _words(
    "Aldermoor Bellhaven Calder Dunmere Eastwick Farrow Glenmarch Harrowgate Inverlee Juniper Kestrel Larkspur Merrow "
    "Northfield Oakhurst Pendle Quarry Ravensworth Stonebridge Thornbury Umberley Verity Westmarch Yarrow"
)
_MAKERS = _words("Alder Beacon Cobalt Delta Ember Foxglove Granite Helix Indigo Jasper Kite Lumen Maple Nimbus Onyx")
_HOUSES = _words("Pictures Studios Works House Press Media Films Arts Labs Collective")
_MOODS = ("a slow and thoughtful", "a fast and loud", "a warm and gentle", "a dark and tense", "a playful")

_SERIES_SHARE = 0.25
_LONGEST_SERIES = 6


@dataclass(frozen=True)
class ItemPlan:
    """The structure planted in the items. Item i has the id i + 1; arrays are # [items] except the pools'.

    A series is a run of consecutive items of one genre and brand. `parts_left` is the number of parts after an item.
    Pools are lists of items by popularity: one per genre, one per brand, and one of all items. Pool p is
    `pooled[pool_start[p] : pool_start[p] + pool_size[p]]`.
    """

    genre: np.ndarray
    second_genre: np.ndarray
    brand: np.ndarray
    group: np.ndarray
    part: np.ndarray
    parts_left: np.ndarray
    year: np.ndarray
    pooled: np.ndarray
    pool_start: np.ndarray
    pool_size: np.ndarray


def plan_items(items: int, genres: int, brands: int, rng: np.random.Generator) -> ItemPlan:
    """Draw the items. Brands have Zipf popularity; genres are equally frequent."""
    lengths = np.where(rng.random(items) < _SERIES_SHARE, rng.integers(2, _LONGEST_SERIES + 1, items), 1)
    ends = np.minimum(np.cumsum(lengths), items)
    lengths = np.diff(ends, prepend=0)
    lengths = lengths[lengths > 0]
    groups = len(lengths)
    group = np.repeat(np.arange(groups), lengths)
    part = np.arange(items) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    genre = rng.integers(0, genres, groups)[group]
    second = rng.integers(0, genres, groups)[group]
    second = np.where((rng.random(groups)[group] < 0.4) & (second != genre), second, -1)
    brand = zipf_ranks(rng.random(groups), np.full(groups, brands))[group]
    pooled, sizes = _pools(genre, brand, genres, brands, rng.random(items))
    starts = np.cumsum(sizes) - sizes
    # A brand without items gets the pool of all items.
    empty = sizes == 0
    return ItemPlan(
        genre,
        second,
        brand,
        group,
        part,
        lengths[group] - part,
        (1960 + rng.integers(0, 60, groups))[group] + part - 1,
        pooled.astype(np.int32),
        np.where(empty, starts[-1], starts),
        np.where(empty, items, sizes),
    )


def zipf_ranks(uniform: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Ranks from 0 below `sizes` from uniform numbers in [0, 1). Their probability falls as 1 / (rank + 1)."""
    ranks = np.expm1(uniform * np.log1p(sizes)).astype(np.int64)
    return np.minimum(ranks, sizes - 1)


def genre_names(genres: int) -> list[str]:
    return list(GENRES)[:genres]


def brand_name(brand: int) -> str:
    house, maker = divmod(brand, len(_MAKERS))
    number, house = divmod(house, len(_HOUSES))
    return f"{_MAKERS[maker]} {_HOUSES[house]}" + (f" {number + 1}" if number else "")


def write_items(path: Path, plan: ItemPlan, genres: int, rng: np.random.Generator) -> None:
    """Write item_id, title, genres (joined by "|"), brand, series, year and text (2 to 4 sentences) as CSV."""
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["item_id", "title", "genres", "brand", "series", "year", "text"])
        writer.writerows(_item_rows(plan, genre_names(genres), rng))


def _pools(
    genre: np.ndarray, brand: np.ndarray, genres: int, brands: int, unpopularity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All pools one after another, and their sizes: genres, then brands, then one pool of all items."""
    by_popularity = np.argsort(unpopularity)
    by_genre = by_popularity[np.argsort(genre[by_popularity], kind="stable")]
    by_brand = by_popularity[np.argsort(brand[by_popularity], kind="stable")]
    sizes = [np.bincount(genre, minlength=genres), np.bincount(brand, minlength=brands), np.array([len(genre)])]
    return np.concatenate([by_genre, by_brand, by_popularity]), np.concatenate(sizes)


def _item_rows(plan: ItemPlan, genres: list[str], rng: np.random.Generator) -> Iterator[list[object]]:
    places = rng.permutation(len(_ADJECTIVES) * len(_NOUNS) * len(_PLACES))
    picks = rng.integers(0, 1 << 30, len(plan.genre)).tolist()
    columns = (plan.genre, plan.second_genre, plan.brand, plan.group, plan.part, plan.parts_left, plan.year)
    for item, (genre, second, brand, group, part, left, year) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        name = _name(group, places)
        in_series = part + left > 1
        title = f"{name}: Part {part}" if in_series else name
        kinds = [genres[genre]] + ([genres[second]] if second >= 0 else [])
        text = _text(title, name if in_series else "", kinds, brand_name(brand), part, year, picks[item])
        yield [item + 1, title, "|".join(kinds), brand_name(brand), name if in_series else "", year, text]


def _name(group: int, places: np.ndarray) -> str:
    number, place = divmod(group, len(places))
    rest, adjective = divmod(int(places[place]), len(_ADJECTIVES))
    town, noun = divmod(rest, len(_NOUNS))
    return f"The {_ADJECTIVES[adjective]} {_NOUNS[noun]} of {_PLACES[town]}" + (f" {number + 1}" if number else "")


def _text(title: str, series: str, kinds: list[str], brand: str, part: int, year: int, pick: int) -> str:
    themes = GENRES[kinds[0]]
    mood = _MOODS[pick % len(_MOODS)]
    sentences = [
        f"{title} is {mood} {kinds[0].lower()} story that {brand} released in {year}.",
        f"It tells of {themes[pick % 3]} and {themes[(pick + 1) % 3]}.",
    ]
    if len(kinds) > 1:
        sentences.append(f"There is a touch of {kinds[1].lower()}, with {GENRES[kinds[1]][pick % 3]}.")
    if series:
        sentences.append(f"It is part {part} of the series {series}.")
    return " ".join(sentences)
