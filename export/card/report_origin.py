"""The report card's account of what was done to the model: layers kept finer, rows of the head, layers taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.card.charts import Bar, Group, bars
from export.card.markup import element, figure_text, number, share, share_text, table, text
from export.card.report_figures import figure, plots

MAX_LAYERS = 16
_REASONS = ("byte_tokens", "control_tokens", "answer_tokens", "domain_tokens")


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values; a value that holds names and values itself is told line by line."""
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += [(f"{_words(name)}: {_words(key)}", _cell(key, item)) for key, item in value.items()]
        else:
            rows.append((_words(name), _cell(name, value)))
    return table(["", "result"], rows)


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _cell(key: object, value: Any) -> Any:
    part = share(value)
    if part is not None and str(key).endswith(("share", "agreement", "right")):
        return share_text(part, 2)
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(name)} {figure_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(figure_text(item) for item in value)
    return value


def sensitivity_figure(layers: Sequence[Mapping[str, Any]]) -> str:
    """How much each layer loses in INT4, and which stay int8 for it."""
    known = [(row, loss) for row in layers if (loss := number(row.get("kl_nats"))) is not None]
    if not known:
        return ""
    known.sort(key=lambda item: (-item[1], str(item[0].get("layer"))))
    legend = ["int4", "int8"]
    groups = [
        Group(
            str(row.get("layer")),
            (
                Bar(
                    "int8" if row.get("int8") else "int4", max(0.0, loss), figure_text(loss), int(bool(row.get("int8")))
                ),
            ),
        )
        for row, loss in known[:MAX_LAYERS]
    ]
    note = "Divergence from fp32 (KL, nats) when this layer alone is rounded to four bits."
    if len(known) > MAX_LAYERS:
        note += f" The {MAX_LAYERS} most sensitive of {len(known)}; the numbers hold all."
    rows = [(str(row.get("layer")), "int8" if row.get("int8") else "int4", loss) for row, loss in known]
    title = "Loss of each layer in INT4"
    picture = bars(title, groups, legend=legend)
    return figure(title, note, picture, table(["layer", "kept as", "divergence, nats"], rows))


def vocabulary_section(vocabulary: Mapping[str, Any]) -> str:
    """Why the head has the rows that it has, and what it can write.

    Args:
        vocabulary: `export.graphs.vocabulary.Vocabulary.as_dict`, with that of its ``Reach`` under ``heldout``.
    """
    heldout = vocabulary.get("heldout") or {}
    known = [(reason, count) for reason in _REASONS if (count := number(vocabulary.get(reason))) is not None]
    shown = []
    if known:
        title = "Rows of the head by reason"
        groups = [Group(_words(reason), (Bar("", max(0.0, count), f"{count:,.0f}"),)) for reason, count in known]
        note = "The input table and the tokenizer are whole; what has no row is written byte by byte."
        rows = [*((_words(reason), int(count)) for reason, count in known), ("all", vocabulary.get("rows"))]
        shown.append(figure(title, note, bars(title, groups), table(["reason", "rows"], rows)))
    told = {name: value for name, value in vocabulary.items() if name not in _REASONS}
    part = share(heldout.get("reachable_share"))
    said = "" if part is None else f"{share_text(part, 2)} of the tokens of text that was held out can be chosen."
    return (element("p", text(said)) if said else "") + plots(shown) + facts_table(told)


def lineage_section(facts: Mapping[str, Any]) -> str:
    """One step between the trained checkpoint and the exported one.

    Args:
        facts: ``pruning.json`` (of `export.smaller.prune`) or ``distillation.json`` (of `export.smaller.distil`).
    """
    rounds = facts.get("rounds") or []
    taught = facts.get("recovery") or facts.get("training") or {}
    told = {name: value for name, value in facts.items() if name not in ("format", "rounds", "recovery", "training")}
    parts = [facts_table(told)]
    if rounds:
        dropped = {number(found.get("dropped")) for found in rounds}
        parts.append(plots([_importance_figure(rounds[0].get("layers") or [], dropped)]))
    fits = [(when, taught[when]) for when in ("before", "after") if isinstance(taught.get(when), Mapping)]
    if fits:
        keys = ("right", "loss_nats", "kl_nats")
        rows = [(_words(key), *(_cell(key, fit.get(key)) for _, fit in fits)) for key in keys]
        heading = f"Choices on events held back, before and after {figure_text(taught.get('steps'))} steps of training"
        parts += [element("p", text(heading)), table(["figure", *(when for when, _ in fits)], rows)]
        settings = {name: value for name, value in taught.items() if name not in ("before", "after")}
        parts.append(element("details", element("summary", "how it was trained"), facts_table(settings)))
    return "\n".join(parts)


def _importance_figure(layers: Sequence[Mapping[str, Any]], dropped: set[float | None]) -> str:
    known = [(row, loss) for row in layers if (loss := number(row.get("kl_nats"))) is not None]
    if not known:
        return ""
    groups = [
        Group(f"layer {row.get('layer')}", (Bar("", max(0.0, loss), figure_text(loss), _is_in(row, dropped)),))
        for row, loss in known
    ]
    title = "What each layer is worth"
    note = "Divergence from the whole model (KL, nats) when the layer is left out, before any was."
    rows = [
        (f"layer {row.get('layer')}", "taken out" if _is_in(row, dropped) else "kept", loss, row.get("influence"))
        for row, loss in known
    ]
    picture = bars(title, groups, legend=["kept", "taken out"])
    return figure(title, note, picture, table(["layer", "", "divergence, nats", "influence"], rows))


def _is_in(row: Mapping[str, Any], dropped: set[float | None]) -> int:
    return int(number(row.get("layer")) in dropped)
