"""Entities from the tags of words, and how well they are found: what CoNLL's evaluation and `seqeval` report."""

from collections.abc import Sequence

from server.core import Span
from server.tasks import metrics
from server.tasks.metrics import Report

OUTSIDE = "O"
"""The tag of a word, or the label of a token, that belongs to no entity."""

TypedSpan = tuple[str, int, int]
"""Type of an entity, its first word, and one past its last."""


def entities(tags: Sequence[str]) -> set[TypedSpan]:
    """The entities in the tags of one text, by conlleval's lenient rules.

    An entity starts at `B-X`, at `S-X`, where the type changes and after anything that ends one, so also at an `I-X`
    that follows `O`; it ends with `E-X` and `S-X`. `B` alone is of the type `_`. Any other tag is itself a type, whose
    neighbours are one entity.
    """
    found: set[TypedSpan] = set()
    start, last = 0, ("", "")
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = _parts(tag)
        if kind == last[1] and prefix in ("I", "E") and last[0] in ("B", "I"):
            last = prefix, kind
            continue
        if last[1]:
            found.add((last[1], start, place))
        start, last = place, (prefix, kind)
    return found


def report(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Report:
    """Tags [texts][words]: `precision`, `recall` and `f1` over all entities, and the F1 of each type.

    An entity counts where its type and both ends are right. A figure without entities to compute it from is 0.
    """
    gold, seen = list(map(entities, expected)), list(map(entities, predicted))
    hits = sum(len(one & other) for one, other in zip(gold, seen, strict=True))
    wanted, found = sum(map(len, gold)), sum(map(len, seen))
    return Report(
        len(gold),
        {
            "precision": hits / found if found else 0.0,
            "recall": hits / wanted if wanted else 0.0,
            "f1": 2 * hits / (wanted + found) if hits else 0.0,
        },
        f1_by_type(gold, seen),
    )


def f1_by_type(expected: Sequence[set[TypedSpan]], predicted: Sequence[set[TypedSpan]]) -> dict[str, float]:
    """The F1 of each type of entity that was expected or predicted."""
    types = sorted({kind for row in (*expected, *predicted) for kind, _, _ in row})
    return {kind: metrics.f1_of(_only(expected, kind), _only(predicted, kind)) for kind in types}


def first_overlaps(spans: Sequence[Span], pieces: Sequence[Span]) -> list[int | None]:
    """For each span, the index of the first piece that shares a character with it. Both are in the text's order."""
    found: list[int | None] = []
    index = 0
    for start, end in spans:
        while index < len(pieces) and pieces[index][1] <= start:
            index += 1
        found.append(index if index < len(pieces) and pieces[index][0] < end else None)
    return found


def _parts(tag: str) -> tuple[str, str]:
    """Prefix and type; no type outside of entities."""
    if tag == OUTSIDE:
        return "", ""
    prefix, _, kind = tag.partition("-")
    return (prefix, kind or "_") if prefix in ("B", "I", "E", "S") else ("I", tag)


def _only(rows: Sequence[set[TypedSpan]], kind: str) -> list[set[TypedSpan]]:
    return [{span for span in row if span[0] == kind} for row in rows]
