"""What people and exporters write (manifests, tasks, calibrations), read into frozen dataclasses.

Pydantic is the judge of every document: what it accepts, how it converts, and what it says of each fault. But a worker
would carry it in memory all its life for a few files that were judged when the bundle was installed. So a plain reader
goes first. It says yes only where there is nothing to judge; at the least doubt pydantic is imported and decides.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from edge_agent.contract.plain_reader import DoubtError, plain_reader

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class Strict:
    """Base of what a person writes: a key that it does not know is a mistake that the person is told of.

    Documents of other classes may have keys that this version does not know: a newer exporter says more.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


class DocumentError(ValueError):
    """A document is not what it should be.

    Attributes:
        faults: every one found, as (place, what is wrong); the place is empty for the document as a whole.
    """

    def __init__(self, faults: tuple[tuple[str, str], ...]) -> None:
        super().__init__(faults)
        self.faults = faults

    def sentence(self, whole: str) -> str:
        """All faults in a line.

        Args:
            whole: the place of a fault of the whole document.
        """
        return "; ".join(f"{place or whole}: {what}" for place, what in self.faults)

    def __str__(self) -> str:
        return self.sentence("document")


def read_document(kind: type[T], document: object) -> T:
    """Read a document.

    Args:
        kind: a frozen dataclass whose fields name their types and bounds. Its ``__post_init__`` may refuse the whole.
        document: what JSON or YAML gave.

    Raises:
        DocumentError: with every fault.
        EdgeError: what ``__post_init__`` raises by itself.
    """
    wanted: Any = kind
    try:
        read: T = plain_reader(wanted)(document)
    except (DoubtError, ValueError):
        read = _judged(wanted, document)
    return read


def read_json(kind: type[T], raw: bytes | str) -> T:
    """Read a document from JSON.

    Raises:
        DocumentError, EdgeError: as `read_document`; DocumentError as well for what is no JSON, or nests too deep.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DocumentError((("", f"it is not JSON: {error}"),)) from error
    return read_document(kind, document)


def to_document(part: Any, *, exclude_none: bool = False) -> dict[str, Any]:
    """A document as JSON has it; `read_document` reads it again.

    Args:
        part: of any class that `read_document` takes.
        exclude_none: leave out fields that are None.
    """
    kind: Any = type(part)
    dumped: dict[str, Any] = _judge(kind).dump_python(part, mode="json", by_alias=True, exclude_none=exclude_none)
    return dumped


def to_json(part: Any) -> bytes:
    """A document in UTF-8 JSON, on one line; `read_json` reads it again."""
    return json.dumps(to_document(part), separators=(",", ":"), ensure_ascii=False).encode()


@cache
def _judge(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _judged(kind: Any, document: object) -> Any:
    from pydantic import ValidationError

    try:
        return _judge(kind).validate_python(document)
    except ValidationError as error:
        raise DocumentError(_faults(error)) from error
    except UnicodeError as error:  # a fault that quotes such text is one that pydantic cannot tell
        raise DocumentError((("", f"it holds text that is none: {error}"),)) from error


def _faults(error: ValidationError) -> tuple[tuple[str, str], ...]:
    # Pydantic speaks of arguments where a dataclass is built; who wrote the file knows of none.
    said = {
        "unexpected_keyword_argument": "Extra inputs are not permitted",
        "dataclass_type": "Input should be a mapping of keys to values",
    }
    found = error.errors()
    # Of a list whose every part is at fault it says as well that it is too short.
    wholes = {one["loc"][:length] for one in found for length in range(len(one["loc"]))}
    told = [one for one in found if one["type"] != "too_short" or one["loc"] not in wholes]
    return tuple((".".join(map(str, one["loc"])), said.get(one["type"], one["msg"])) for one in told)
