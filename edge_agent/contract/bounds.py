"""Bounds of a document's values that `annotated_types` has no name for.

They stand in ``Annotated``, beside that library's ``Ge``, ``Le``, ``MinLen``, …, and each tells pydantic by itself what
it means, so that no class of a document has to import pydantic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


@dataclass(frozen=True)
class Matches:
    """All of a text fits a pattern, given with its anchors."""

    pattern: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return cast("CoreSchema", {**handler(source), "pattern": self.pattern})


@dataclass(frozen=True)
class Finite:
    """A number that is neither infinite nor no number at all."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return cast("CoreSchema", {**handler(source), "allow_inf_nan": False})


@dataclass(frozen=True)
class Forms:
    """A value of one of several forms, told apart by a look at it, so that a fault is told once and not per form.

    Args:
        kinds: name of a form and its type; the name appears in the place of a fault.
        form_of: the name of a value's form.
    """

    kinds: tuple[tuple[str, Any], ...]
    form_of: Callable[[Any], str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core.core_schema import tagged_union_schema

        return tagged_union_schema({name: handler.generate_schema(kind) for name, kind in self.kinds}, self.form_of)
