"""Build a validated config from a YAML file and dotted options. Options override the file that `--config` names."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from raypipe.config import Config, merge
from raypipe.errors import UsageError

C = TypeVar("C", bound=Config)
# Finds the option's name in the two messages of pydantic-settings about a value that is not JSON.
_UNPARSED = re.compile(r'(?:encountered for |field ")([\w.]+)')


def parse_config(job: str, config_type: type[C], argv: Sequence[str]) -> C:
    """The config of `job` from its command-line options.

    Raises UsageError, with the remedy, for unknown keys, wrong types, values that are not JSON, and unreadable files.
    """
    parser = _Parser(prog=f"raypipe {job}")
    parser.add_argument("--config", help="YAML file with the same keys, nested; options win over it")
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in config_type.model_fields.items()}
    try:
        source: Any = CliSettingsSource(
            create_model(config_type.__name__, __base__=BaseSettings, **fields),
            cli_parse_args=list(argv),
            root_parser=parser,
            cli_implicit_flags=True,
            cli_prefix="",
        )
        values = source()
    except SettingsError as error:
        if (found := _UNPARSED.search(str(error))) is None:
            raise
        raise UsageError(*_explain_json(found[1], argv, config_type)) from None
    file = option(argv, "--config")
    return validated(config_type, merge(_read_yaml(file), values) if file else values)


def validated(config_type: type[C], values: Mapping[str, Any]) -> C:
    """The config made of nested values. Raises UsageError as `parse_config` does."""
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise UsageError(*_explain(error, config_type)) from None


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of one option, or None if it is not given. Other options are ignored."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(name)
    return getattr(parser.parse_known_args(list(argv))[0], name.strip("-"))


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        close = difflib.get_close_matches(unknown[0], known, 1) if unknown else []
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UsageError(f"{message[0].upper()}{message[1:]}.", f"{hint}`{self.prog} --help` lists every option.")


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The config file {path} cannot be read: {error}.", "Check the path.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"The config file {path} is not YAML: {error}.", "Mend it at the line named.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"The config file {path} holds no keys.", "Write `key: value` lines, as in jobs/*.yaml.")
    return values


def _explain(error: ValidationError, config_type: type[Config]) -> tuple[str, str]:
    """The first problem in words, and its remedy."""
    errors = error.errors()
    # An unknown key is reported first: a misspelt key is also why another one is missing.
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys(config_type, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        return f"Unknown config key {place!r}.", f"{hint}Known here: {', '.join(known)}."
    if first["type"] == "missing":
        return f"The config key {place!r} is missing.", f"Add --{place} VALUE, or the key to the config file."
    if first["type"] != "value_error":
        return f"Config key {place!r} is {first.get('input')!r}: {first['msg']}.", f"Correct --{place}."
    told = str(first["ctx"]["error"])
    if isinstance(first["input"], Mapping):
        # No single option is wrong, only their combination, so their values would tell the reader nothing. The first
        # word is often the name of an option or a model, so its case is kept.
        return f"{f'--{place}: ' if place else ''}{told}.", "Correct the options this is about."
    return f"Config key {place!r} is {first['input']!r}: {told}.", f"Correct --{place}."


def _explain_json(name: str, argv: Sequence[str], config_type: type[Config]) -> tuple[str, str]:
    """The problem of an option whose value is not JSON, and an example of what it takes."""
    *path, last = name.split(".")
    example = json.dumps(_example(_section(config_type, path).model_fields[last].annotation))
    return (
        f"--{name} is {option(argv, f'--{name}')!r}, which is not written as JSON.",
        f"Write it for example so, names and texts in double quotes: --{name} '{example}'.",
    )


def _example(annotation: Any) -> Any:
    """An example value of the type, as it is in JSON."""
    origin, types = get_origin(annotation), [one for one in get_args(annotation) if one not in (type(None), ...)]
    if origin is Literal:
        return types[0]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"NAME": _example(types[1])}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return [_example(types[0])]
    if types:
        return _example(types[0])
    if isinstance(annotation, type) and issubclass(annotation, Config):
        name, field = next(iter(annotation.model_fields.items()))
        return {name: _example(field.annotation)}
    return {bool: True, int: 1, float: 1.5}.get(annotation, "TEXT")


def _keys(config_type: type[Config], path: Sequence[str | int]) -> list[str]:
    return sorted(_section(config_type, path).model_fields)


def _section(config_type: type[Config], path: Sequence[str | int]) -> type[Config]:
    """The config class at a path of keys."""
    current: Any = config_type
    for part in path:
        annotation = current.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        current = next(option for option in options if isinstance(option, type) and issubclass(option, Config))
    return current
