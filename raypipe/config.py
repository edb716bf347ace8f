"""Frozen configuration models. Every field declares whether it shapes the output.

A field is declared with `shaping` if it is part of the stage's fingerprint: changing it computes outputs anew. It is
declared with `free` if it changes speed, place or price, but never a value. A test lists every field of every config
and fails if a field is declared with neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo


class Config(BaseModel):
    """Base class of all configuration: frozen, unknown keys are errors, and each config builds what it describes."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _over_the_default(cls, values: Any) -> Any:
        """Complete a section that is given in part with the rest of its field's default.

        This matters if that default differs from the section type's own defaults.
        """
        if not isinstance(values, Mapping):
            return values
        merged = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(merged.get(name), Mapping) and field.default_factory is not None:
                default = field.get_default(call_default_factory=True)
                if isinstance(default, Config):
                    merged[name] = merge(default.model_dump(exclude_unset=True), merged[name])
        return merged

    def shaping_values(self) -> dict[str, Any]:
        """The values that shape the output, as plain JSON types, nested configs included."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if not is_shaping(field):
                continue
            value = getattr(self, name)
            values[name] = value.shaping_values() if isinstance(value, Config) else self.model_dump(mode="json")[name]
        return values


WRITTEN = BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value)
"""Of a field that is one of some numbers, as options on the command line are texts: `Annotated[Literal[1, 2], WRITTEN]`."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` merged into `base`, section by section. Values of `over` win."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def first_problem(error: ValidationError) -> str:
    """The first problem of the error: where it is, and then what it is in words."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    told = first["msg"].removeprefix("Value error, ")
    return f"{place}: {told}" if place else told


def shaping(default: Any = ..., description: str = "", **kwargs: Any) -> Any:
    """A field that shapes the output and therefore belongs to the fingerprint."""
    return _field(default, description, True, kwargs)


def free(default: Any = ..., description: str = "", **kwargs: Any) -> Any:
    """A field that never changes an output value: paths, workers, batch sizes, prices."""
    return _field(default, description, False, kwargs)


def is_shaping(field: FieldInfo) -> bool:
    """Whether `field` was declared `shaping`. Raises AssertionError if it was declared with neither."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"{field} is declared with neither shaping() nor free()"
    assert "shaping" in extra, f"{field} is declared with neither shaping() nor free()"
    return bool(extra["shaping"])


def _field(default: Any, description: str, shapes: bool, kwargs: dict[str, Any]) -> Any:
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=description, json_schema_extra={"shaping": shapes}, **factory, **kwargs)
