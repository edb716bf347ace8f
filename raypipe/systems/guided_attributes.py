"""Attributes that items and users are scored on: a domain's list, a file's list, or topics derived from a catalogue."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError, field_validator

from raypipe.config import Config, first_problem, shaping
from raypipe.errors import UsageError
from raypipe.language.catalogue import Catalogue

CATALOGUE = "catalogue"
"""The name of the domain whose attributes are derived."""

_FILES = resources.files("raypipe.systems") / "domains"
_WORD = re.compile(r"[^\W\d_]{3,}")
_WORDS_OF_A_NAME = 3
_MOST_COMMON = 0.5  # A word in more than this share of the items does not tell items apart.
_RAREST = 3  # A word in fewer items than this stands for no topic.


class Attribute(Config):
    """An attribute to score: its name, its description, and what the ends of the scale mean."""

    name: str = shaping(description="as it stands in answers", min_length=1)
    description: str = shaping(description="one line that says what it is", min_length=1)
    low: str = shaping(description="what the lowest number means", min_length=1)
    high: str = shaping(description="what the highest number means", min_length=1)


class Domain(Config):
    """The attributes of one kind of items."""

    attributes: tuple[Attribute, ...] = shaping(description="two or more, each with a name of its own", min_length=2)

    @field_validator("attributes")
    @classmethod
    def _names_differ(cls, attributes: tuple[Attribute, ...]) -> tuple[Attribute, ...]:
        if len({attribute.name for attribute in attributes}) < len(attributes):
            raise ValueError("two attributes have one name")
        return attributes


def domains() -> list[str]:
    """The names of the domains that come with a list of attributes."""
    return sorted(file.name.removesuffix(".yaml") for file in _FILES.iterdir() if file.name.endswith(".yaml"))


def find_attributes(domain: str, catalogue: Catalogue, count: int) -> tuple[Attribute, ...]:
    """The attributes of a named domain, of a YAML file like `raypipe/systems/domains/movies.yaml`, or of the catalogue.

    At most `count` are derived from the catalogue. Raises UsageError if `domain` is neither a known name nor a readable
    file, or if the file holds no attributes.
    """
    if domain == CATALOGUE:
        return derived_attributes(catalogue, count)
    known = domains()
    try:
        text = (_FILES / f"{domain}.yaml").read_text() if domain in known else Path(domain).read_text(encoding="utf-8")
        return Domain.model_validate(yaml.safe_load(text)).attributes
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"There is no domain {domain!r}, and no file of that name can be read: {error}.",
            f"Name {', '.join(known)}, {CATALOGUE}, or a YAML file of attributes.",
        ) from None
    except (yaml.YAMLError, ValidationError) as error:
        told = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise UsageError(
            f"{domain} holds no list of attributes: {told}.",
            "Write `attributes:` and of each its name, description, low and high, as in raypipe/systems/domains/movies.yaml.",
        ) from None


def derived_attributes(catalogue: Catalogue, count: int) -> tuple[Attribute, ...]:
    """Derive topics from titles, texts and field values, and name each after its foremost words.

    Topics are the components of a non-negative factorisation of TF-IDF (Lee & Seung 1999); a field's value counts as
    one word. Raises UsageError if the catalogue's words do not tell its items apart.
    """
    # Imported here: every job that aligns imports this module, and scikit-learn imports as slowly as torch.
    from sklearn.decomposition import NMF
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    texts = catalogue.texts or [""] * len(catalogue.titles)
    documents = list(zip(catalogue.titles, catalogue.attributes, texts, strict=True))
    telling = partial(_words, of_no_topic=ENGLISH_STOP_WORDS)
    vectorizer = TfidfVectorizer(analyzer=telling, min_df=_RAREST, max_df=_MOST_COMMON)
    try:
        weights = vectorizer.fit_transform(documents)
    except ValueError:
        weights = None
    parts = 0 if weights is None else min(count, *weights.shape)
    if weights is None or parts < 2:
        raise UsageError(
            f"The words of {len(documents):,} items do not tell them apart: no attributes can be derived.",
            f"Name a domain with --guided.domain: {', '.join(domains())}, or a YAML file of attributes.",
        )
    topics = NMF(parts, init="nndsvda", max_iter=400, random_state=0).fit(weights).components_
    words = vectorizer.get_feature_names_out()
    named: dict[str, Attribute] = {}
    for topic in topics:
        foremost = [
            str(words[place]) for place in (-topic).argsort(kind="stable")[:_WORDS_OF_A_NAME] if topic[place] > 0
        ]
        name = " ".join(foremost)
        if name and name not in named:
            listed = ", ".join(foremost)
            named[name] = Attribute(
                name=name,
                description=f"how much it has to do with {listed}",
                low="nothing at all",
                high="all about it",
            )
    return tuple(named.values())


def _words(document: tuple[str, Mapping[str, Sequence[str]], str], of_no_topic: Collection[str]) -> Iterator[str]:
    title, attributes, text = document
    yield from (value.lower() for values in attributes.values() for value in values)
    for word in _WORD.findall(f"{title} {text}".lower()):
        if word not in of_no_topic:
            yield word
