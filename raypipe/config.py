"""Frozen configuration models whose every field says whether it shapes the output.

A field is declared with `shaping` (it is part of the stage's fingerprint: changing it computes outputs anew) or with
`free` (it changes speed, place or price, never a value). A test lists every field of every config and fails on one
declared with neither.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Config(BaseModel):
    """Base of all configuration: frozen, unknown keys are errors, and each config builds what it describes."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def shaping_values(self) -> dict[str, Any]:
        """The values that shape the output, as plain JSON types, nested configs included."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if not is_shaping(field):
                continue
            value = getattr(self, name)
            values[name] = value.shaping_values() if isinstance(value, Config) else self.model_dump(mode="json")[name]
        return values


def shaping(default: Any = ..., description: str = "", **kwargs: Any) -> Any:
    """A field that shapes the output and so belongs to the fingerprint."""
    return _field(default, description, True, kwargs)


def free(default: Any = ..., description: str = "", **kwargs: Any) -> Any:
    """A field that never changes an output value: paths, workers, batch sizes, prices."""
    return _field(default, description, False, kwargs)


def is_shaping(field: FieldInfo) -> bool:
    """Whether `field` was declared `shaping`; raises AssertionError when it was declared with neither."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"{field} is declared with neither shaping() nor free()"
    assert "shaping" in extra, f"{field} is declared with neither shaping() nor free()"
    return bool(extra["shaping"])


def _field(default: Any, description: str, shapes: bool, kwargs: dict[str, Any]) -> Any:
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=description, json_schema_extra={"shaping": shapes}, **factory, **kwargs)
