"""How well labels were predicted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Report:
    """Measured on labelled texts."""

    rows: int
    accuracy: float
    """Share of the texts with the right label."""
    macro_f1: float
    """Mean of the labels' F1, each label counting the same however rare it is."""
    f1: dict[str, float]
    """By label, of all labels that were expected or predicted."""


def report(expected: Sequence[str], predicted: Sequence[str]) -> Report:
    """Compares labels text by text. Raises ValueError where the lengths differ or there is nothing to compare."""
    if not expected:
        raise ValueError("no labels to compare")
    hits = Counter(label for label, other in zip(expected, predicted, strict=True) if label == other)
    # Of a label, F1 = 2 TP / (2 TP + FP + FN); the denominator is how often it was expected plus predicted.
    counts = Counter(expected) + Counter(predicted)
    f1 = {label: 2 * hits[label] / counts[label] for label in sorted(counts)}
    return Report(rows=len(expected), accuracy=hits.total() / len(expected), macro_f1=sum(f1.values()) / len(f1), f1=f1)
