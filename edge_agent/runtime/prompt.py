"""An event as token ids that fit the task's limit: cut visibly or refused, never silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.contract.event import Event, check_event, clean_text
from edge_agent.contract.task import EventField, TaskSpec
from edge_agent.errors import RefusedError

Encode = Callable[[str], list[int]]
_NFKC_EXPANSION = 18  # one code point becomes at most 18 (U+FDFA)
_MAX_INT_BITS = 512  # wider integers would overflow the arithmetic of `Deviation` lines


@dataclass(frozen=True)
class EventPrompt:
    """What follows the cached prefix.

    Args:
        ids: token ids of the rendered event, answer cue included.
        truncated: whether text of the event was left out.
        shortened: whether it was left out for want of tokens: then the rendered text does not tell all.
    """

    ids: list[int]
    truncated: bool
    shortened: bool = False


def rendered_event(task: TaskSpec, event: Event) -> str:
    """The text that the model would see of an event, were there no limit of tokens.

    Args:
        task: its template and limits.
        event: a flat event; checked again here, because not every caller parsed it from bytes.

    Raises:
        RefusedError: ``event.too_large``, ``event.no_known_field`` or a fault of `check_event`.
    """
    check_event(event)
    _check_size(task, event)
    return task.render(event)


def event_prompt(task: TaskSpec, event: Event, encode: Encode, rendered: str | None = None) -> EventPrompt:
    """Render and tokenise one event.

    Args:
        task: its template and limits.
        event: a flat event.
        encode: text to token ids.
        rendered: what `rendered_event` gave, where it was asked already.

    Returns:
        At most ``task.limits.max_prompt_tokens`` ids.

    Raises:
        RefusedError: ``event.too_long``, or as `rendered_event`.
    """
    limit = task.limits.max_prompt_tokens
    ids = encode(rendered_event(task, event) if rendered is None else rendered)
    if len(ids) <= limit:
        return EventPrompt(ids, truncated=cut_by_template(task, event))
    if task.prompt.on_overlong == "refuse":
        raise RefusedError("event.too_long", f"event of {len(ids)} tokens exceeds {limit}", tokens=len(ids))
    return EventPrompt(_shorten(task, event, encode, limit), truncated=True, shortened=True)


def _shorten(task: TaskSpec, event: Event, encode: Encode, limit: int) -> list[int]:
    """Cut the tail of the longest text, then of the next longest, until the prompt fits."""
    remaining = dict(event)
    for name in _texts_by_length(task, event, encode):
        text = clean_text(str(remaining[name]), len(str(remaining[name])))
        fits, over = 0, len(text)
        while over - fits > 1:  # invariant: `over` characters do not fit
            half = (fits + over) // 2
            if len(_render(task, remaining, name, text[:half], encode)) <= limit:
                fits = half
            else:
                over = half
        ids = _render(task, remaining, name, text[:fits], encode)
        if len(ids) <= limit:
            return ids
        remaining[name] = None
    raise RefusedError("event.too_long", f"event exceeds {limit} tokens even without its texts", limit_tokens=limit)


def _render(task: TaskSpec, event: Event, name: str, text: str, encode: Encode) -> list[int]:
    shown = {**event, name: text or None}
    try:
        return encode(task.render(shown))
    except RefusedError as error:  # the last known field was cut away
        raise RefusedError("event.too_long", "nothing of the event is left after cutting it to the limit") from error


def _texts_by_length(task: TaskSpec, event: Event, encode: Encode) -> list[str]:
    # In tokens, not characters: a short text in a rare script costs more than a long machine name.
    shown = {f.field: len(encode(clean_text(str(event[f.field]), f.max_chars))) for f in _text_fields(task, event)}
    return sorted(shown, key=lambda name: -shown[name])


def _text_fields(task: TaskSpec, event: Event) -> list[EventField]:
    return [f for f in task.prompt.event if isinstance(f, EventField) and isinstance(event.get(f.field), str)]


def cut_by_template(task: TaskSpec, event: Event) -> bool:
    """Whether a field is longer than the template shows of it."""
    for item in task.prompt.event:
        value = event.get(item.field) if isinstance(item, EventField) else None
        if not isinstance(item, EventField) or value is None or isinstance(value, bool | float):
            continue
        text = str(value)
        # The cheap test first: plain short text needs no second normalisation. NFKC can lengthen what is not ASCII.
        if text.isascii() and len(text) <= item.max_chars:
            continue
        if len(clean_text(text, len(text) * _NFKC_EXPANSION)) > item.max_chars:
            return True
    return False


def _check_size(task: TaskSpec, event: Event) -> None:
    # Characters, not bytes: an upper bound is all that is needed, and the sum costs microseconds.
    size = 0
    for name, value in event.items():
        if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise RefusedError("event.bad_field", f"field {name!r} is an integer of {value.bit_length()} bits")
        size += len(name) + (len(value) if isinstance(value, str) else 8)
    if size > task.limits.max_event_bytes:
        raise RefusedError(
            "event.too_large",
            f"event of {size} characters exceeds {task.limits.max_event_bytes}",
            size_chars=size,
            limit=task.limits.max_event_bytes,
        )
