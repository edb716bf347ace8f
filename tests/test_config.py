"""Every field of every config says what it is and whether it shapes the output; fingerprints hold exactly those that do."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import raypipe
from raypipe.config import Config, free, is_shaping, shaping
from raypipe.engines.engine import EngineConfig
from raypipe.pipeline.ingest import IngestConfig
from raypipe.pipeline.summarize import SummarizeConfig
from raypipe.systems.summaries import SummariesConfig


def _every_config() -> list[type[Config]]:
    for module in pkgutil.walk_packages(raypipe.__path__, "raypipe."):
        importlib.import_module(module.name)
    found: list[type[Config]] = []
    left = [Config]
    while left:
        children = left.pop().__subclasses__()
        found += [child for child in children if child not in found and child.__module__.startswith("raypipe.")]
        left += children
    return sorted(found, key=lambda config: f"{config.__module__}.{config.__name__}")


CONFIGS = _every_config()


class Inner(Config):
    kept: int = shaping(1)
    dropped: int = free(2)


class Outer(Config):
    inner: Inner = shaping(Inner)
    place: Inner = free(Inner)
    words: tuple[str, ...] = shaping(("a",))
    path: str = free("/tmp")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_is_marked_as_shaping_or_free_and_every_option_described(config: type[Config]) -> None:
    assert config.model_fields, config
    for name, field in config.model_fields.items():
        assert is_shaping(field) in (True, False), f"{config.__name__}.{name}"
        # A nested config's own fields are the options.
        is_nested = isinstance(field.annotation, type) and issubclass(field.annotation, Config)
        assert is_nested or field.description, f"{config.__name__}.{name} has no description"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_config_is_frozen_and_refuses_unknown_keys(config: type[Config]) -> None:
    assert config.model_config["frozen"]
    assert config.model_config["extra"] == "forbid"


def test_the_walk_found_the_configs_of_every_room() -> None:
    assert {"IngestConfig", "SummarizeConfig", "NightlyConfig", "LmConfig", "EngineConfig", "Decoding"} <= {
        config.__name__ for config in CONFIGS
    }


def test_shaping_values_hold_nested_ones_and_leave_free_ones_out() -> None:
    assert Outer().shaping_values() == {"inner": {"kept": 1}, "words": ["a"]}
    changed = Outer(inner=Inner(kept=5, dropped=9), path="/elsewhere", place=Inner(kept=7))
    assert changed.shaping_values() == {"inner": {"kept": 5}, "words": ["a"]}


def test_a_field_marked_as_neither_is_found() -> None:
    class Unmarked(Config):
        value: int = 1

    with pytest.raises(AssertionError, match="neither shaping"):
        Unmarked().shaping_values()


def test_workers_batches_prices_places_and_tracking_shape_nothing() -> None:
    plain = SummarizeConfig(engine=EngineConfig(engine="echo"))
    moved = SummarizeConfig(
        engine=EngineConfig(engine="echo", batch_tokens=7, threads=3, device="cpu", lm="elsewhere"),
        workspace="s3://bucket/elsewhere",
        tracking="off",
        micro_batch_users=3,
        max_calls=1,
        price_in=2.0,
    )
    assert moved.shaping_values() == plain.shaping_values()
    longer = plain.model_copy(update={"summaries": SummariesConfig(window_events=51)})
    assert longer.shaping_values() != plain.shaping_values()


def test_how_an_ingest_is_split_shapes_nothing_and_how_it_is_read_does() -> None:
    def values(**log: object) -> dict:
        return IngestConfig.model_validate({"log": {"path": "a.csv", **log}}).shaping_values()

    assert values() == values(split_bytes=1) == values(path="b.csv")
    assert values() != values(min_rating=3.0)


def test_a_section_given_in_part_keeps_the_rest_of_its_default() -> None:
    class Inner(Config):
        a: int = shaping(1)
        b: int = shaping(2)

    class Outer(Config):
        inner: Inner = shaping(lambda: Inner(b=20))

    assert Outer.model_validate({"inner": {"a": 5}}).inner == Inner(a=5, b=20)
    assert Outer.model_validate({"inner": {"b": 7}}).inner == Inner(b=7)
    assert Outer().inner == Inner(b=20)
