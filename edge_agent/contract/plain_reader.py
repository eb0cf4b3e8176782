"""Reads a document where there is nothing to judge: every value has exactly its field's type and keeps to its bounds.

Then it builds what pydantic would have built; everything else is a `DoubtError`, and pydantic's to decide (`document`).
``tests/unit/contract/test_document.py`` holds the two against each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from edge_agent.contract.bounds import Finite, Forms, Matches

Reader = Callable[[Any], Any]
_MAX_EXACT = 1 << 53
"""Up to here every integer is a float as well."""


class DoubtError(Exception):
    """The plain reader cannot vouch for a value. Nobody is told of it: somebody else decides."""


@cache
def plain_reader(kind: Any) -> Reader:
    """What reads a value of a type.

    Args:
        kind: a dataclass, or the type of a field with its bounds.

    Returns:
        A function from what JSON or YAML gave to the value. It raises `DoubtError`, or ValueError, where the value is
        not plainly one of ``kind``.

    Raises:
        TypeError: a type or a bound that is not known here, which is a mistake in the code.
    """
    if kind in _LEAVES:
        return _LEAVES[kind]
    if is_dataclass(kind):
        return _part(kind)
    try:
        return _COMPOSED[get_origin(kind)](kind)
    except KeyError:
        raise TypeError(f"documents have no {kind}") from None


def _exactly(kind: type) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise DoubtError
        return value

    return read


def _number(value: Any) -> float:
    if type(value) is not float and not (type(value) is int and abs(value) <= _MAX_EXACT):
        raise DoubtError
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise DoubtError
    value.encode()  # ValueError: a lone surrogate is no text
    return value


def _literal(kind: Any) -> Reader:
    # By type too: in Python 1 equals true.
    allowed = {(type(value), value) for value in get_args(kind)}

    def read(value: Any) -> Any:
        if type(value) not in (str, int) or (type(value), value) not in allowed:
            raise DoubtError
        return value

    return read


def _row(kind: Any) -> Reader:
    each, rest = get_args(kind)
    if rest is not ...:
        raise TypeError(f"documents have no {kind}")
    item = plain_reader(each)

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple):
            raise DoubtError
        return tuple(item(one) for one in value)

    return read


def _mapping(kind: Any) -> Reader:
    key, item = map(plain_reader, get_args(kind))

    def read(value: Any) -> dict[Any, Any]:
        if type(value) is not dict:
            raise DoubtError
        return {key(name): item(one) for name, one in value.items()}

    return read


def _union(kind: Any) -> Reader:
    """Reads the one form that a value has. A number of a type that is named goes before one that is converted."""
    kinds = get_args(kind)
    readers = [plain_reader(one) for one in kinds]

    def read(value: Any) -> Any:
        if type(value) in kinds and type(value) is not str:
            return value
        fitting = []
        for reader in readers:
            try:
                fitting.append(reader(value))
            except (DoubtError, ValueError):
                continue
        if len(fitting) != 1:
            raise DoubtError
        return fitting[0]

    return read


def _bounded(kind: Any) -> Reader:
    reader = plain_reader(get_args(kind)[0])
    bounds = kind.__metadata__
    if unknown := [bound for bound in bounds if type(bound) not in _HOLDS]:
        raise TypeError(f"documents know no bounds {unknown}")

    def read(value: Any) -> Any:
        found = reader(value)
        if not all(_HOLDS[type(bound)](bound, found) for bound in bounds):
            raise DoubtError
        return found

    return read


def _part(kind: Any) -> Reader:
    config: Mapping[str, Any] = getattr(kind, "__pydantic_config__", {})
    key_of: Callable[[str], str] = config.get("alias_generator", lambda name: name)
    hints = get_type_hints(kind, include_extras=True)
    readers = {key_of(one.name): (one.name, plain_reader(hints[one.name])) for one in fields(kind)}
    needed = {key_of(one.name) for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
    others_allowed = config.get("extra") != "forbid"

    def read(value: Any) -> Any:
        if type(value) is not dict or not needed <= value.keys():
            raise DoubtError
        if not (others_allowed or value.keys() <= readers.keys()):
            raise DoubtError
        return kind(**{name: reader(value[key]) for key, (name, reader) in readers.items() if key in value})

    return read


_LEAVES: dict[Any, Reader] = {
    Any: lambda value: value,
    float: _number,
    str: _text,
    int: _exactly(int),
    bool: _exactly(bool),
    NoneType: _exactly(NoneType),
}
_COMPOSED: dict[Any, Callable[[Any], Reader]] = {
    Annotated: _bounded,
    Literal: _literal,
    Union: _union,
    UnionType: _union,
    dict: _mapping,
    tuple: _row,
}
_HOLDS: dict[type, Callable[[Any, Any], bool]] = {
    Ge: lambda bound, value: bool(value >= bound.ge),
    Gt: lambda bound, value: bool(value > bound.gt),
    Le: lambda bound, value: bool(value <= bound.le),
    Lt: lambda bound, value: bool(value < bound.lt),
    MinLen: lambda bound, value: len(value) >= bound.min_length,
    MaxLen: lambda bound, value: len(value) <= bound.max_length,
    Finite: lambda _bound, value: math.isfinite(value),
    Matches: lambda bound, value: re.fullmatch(bound.pattern, value) is not None,
    Forms: lambda _bound, _value: True,  # the union that it stands beside has tried them all
}
