"""Titles without ground: known ones beside the point, and made-up ones in quotes, before a year and behind "such as"."""

from __future__ import annotations

import pytest

from raypipe.metrics.unfounded import Titles

TITLES = Titles(
    [
        *("Alien", "Aliens", "Alien: Resurrection", "M*A*S*H", "What? (1972)", "Airplane!", "Schindler's List", "Big"),
        *("Star Wars (1977)", "Shawshank Redemption, The (1994)", "Dumb and Dumber (1994)", "Heat (1995) [7]"),
        *("Adventures of Priscilla, Queen of the Desert, The (1994)", "Cinema Paradiso (Nuovo cinema Paradiso) (1988)"),
        *("Like Water For Chocolate (1992)", "Dr. Strangelove or: How I Learned to Stop Worrying (1963)"),
    ],
    ["Drama", "War", "Comedy", "Sci-Fi"],
)


def made_up(text: str) -> tuple[str, ...]:
    return TITLES.unfounded(text, [], "Big").made_up


def test_what_is_neither_of_the_history_nor_recommended_is_unfounded() -> None:
    told = TITLES.unfounded(
        'You liked Alien and "Big"; "Aliens," like “Airplane!” and “Alien 9”, is a "classic". Not "M*A*S*H". "Alien 9"!',
        ["Alien", "Big"],
        "Airplane!",
    )
    assert told.unchosen == ("Aliens", "M*A*S*H")
    assert told.made_up == ("Alien 9", "classic")
    clean = TITLES.unfounded("You liked Alien, so Big.", ["Alien"], "Big")
    assert (clean.unchosen, clean.made_up) == ((), ())


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("Yes. Nothing Man (1997) is a Drama.", ("Nothing Man (1997)",)),
        (
            "It resembles The Void of Mars (2003), Alien, Farm, The (1994).",
            ("The Void of Mars (2003)", "Farm, The (1994)"),
        ),
        ("Drama. Void: The Return (1999), Alien, Hole (1998)", ("Void: The Return (1999)", "Hole (1998)")),
        ('It is “Void (1999)” and "Hole" (1998)', ("Void (1999)", "Hole")),
        ("Is it like What Now? (1999)", ("What Now? (1999)",)),
    ],
)
def test_capitalised_words_before_a_year_are_a_title(text: str, titles: tuple[str, ...]) -> None:
    assert set(made_up(text)) == set(titles)


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("They chose films such as Nothing Man.", ("Nothing Man",)),
        ("Much like the Void of Mars, it is War.", ("Void of Mars",)),
        ("Films such as Alien and Nothing Man or Hole are Drama.", ("Nothing Man", "Hole")),
        ("Somebody would like Alien 9 because it is Drama.", ("Alien 9",)),
        ("Like Nothing Man and other films", ("Nothing Man",)),
    ],
)
def test_capitalised_words_behind_such_as_or_like_are_titles(text: str, titles: tuple[str, ...]) -> None:
    assert made_up(text) == titles


@pytest.mark.parametrize(
    "title", ["Star Wars", "The Shawshank Redemption", "Dumb and Dumber", "Heat", "Cinema Paradiso"]
)
@pytest.mark.parametrize(
    "sentence",
    [
        "It is like {}.",
        'It is "{}".',
        "Like {} and Alien",
        "Films such as Alien and {}, of Drama",
        "It is like {} (1977)",
    ],
)
def test_a_known_title_is_not_made_up_however_it_is_written(title: str, sentence: str) -> None:
    assert made_up(sentence.format(title)) == ()


@pytest.mark.parametrize(
    "text",
    [
        "Films such as Adventures of Priscilla, Queen of the Desert, The (1994) and Like Water For Chocolate (1992).",
        "The Adventures of Priscilla, Queen of the Desert (1994) is like Dr. Strangelove or: How I Learned to Stop Worrying.",
        "No. The choices are mostly Drama, War and Comedy. Big is Sci-Fi, as they are not.",
        "Genres such as Drama and War, like Comedy. A Comedy (1997), released (1998).",
        'They like American comedies and "Drama", like I said; a lot like before, such as this one. Just like',
        "Choices such as Romantic Comedy and Cold War tales (about 1960)",
        "",
    ],
)
def test_what_is_no_title_or_a_known_one_is_not_made_up(text: str) -> None:
    assert made_up(text) == ()
