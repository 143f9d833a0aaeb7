"""How good answers are."""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Report:
    """Measured on labelled data."""

    rows: int
    metrics: Mapping[str, float]
    """By name, e.g. `accuracy`, `macro_f1`."""
    f1: Mapping[str, float] = field(default_factory=dict)
    """By label, of all labels that were expected or predicted, for tasks with labels."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())


def single_label(expected: Sequence[str], predicted: Sequence[str]) -> Report:
    """One label per row: `accuracy` and `macro_f1`, the mean of the labels' F1, each counting the same.

    Raises ValueError where the lengths differ or there is nothing to compare.
    """
    _some(expected)
    f1 = f1_by_name([[label] for label in expected], [[label] for label in predicted])
    hits = sum(label == other for label, other in zip(expected, predicted, strict=True))
    return Report(len(expected), {"accuracy": hits / len(expected), "macro_f1": _mean(f1.values())}, f1)


def multi_label(expected: Sequence[Collection[str]], predicted: Sequence[Collection[str]]) -> Report:
    """Any number of labels per row: `exact` (all labels of a row right), `micro_f1` over all of them, `macro_f1`."""
    _some(expected)
    f1 = f1_by_name(expected, predicted)
    exact = sum(set(one) == set(other) for one, other in zip(expected, predicted, strict=True))
    metrics = {"exact": exact / len(expected), "micro_f1": f1_of(expected, predicted), "macro_f1": _mean(f1.values())}
    return Report(len(expected), metrics, f1)


def regression(expected: Sequence[Sequence[float]], predicted: Sequence[Sequence[float]]) -> Report:
    """Values [rows, outputs]: `pearson`, the mean over the outputs, 0 where nothing varies, and `rmse` over all."""
    _some(expected)
    squares = [
        (a - b) ** 2 for one, other in zip(expected, predicted, strict=True) for a, b in zip(one, other, strict=True)
    ]
    columns = zip(zip(*expected, strict=True), zip(*predicted, strict=True), strict=True)
    pearsons = [_pearson(one, other) for one, other in columns]
    return Report(len(expected), {"pearson": _mean(pearsons), "rmse": math.sqrt(_mean(squares))})


def f1_of(expected: Sequence[Collection[Hashable]], predicted: Sequence[Collection[Hashable]]) -> float:
    """Micro F1 of sets of things, row by row: 2 TP / (2 TP + FP + FN); 1 where there is nothing to find or found."""
    hits = sum(len(set(one) & set(other)) for one, other in zip(expected, predicted, strict=True))
    total = sum(len(set(one)) for one in (*expected, *predicted))
    return 2 * hits / total if total else 1.0


def f1_by_name(expected: Sequence[Collection[str]], predicted: Sequence[Collection[str]]) -> dict[str, float]:
    """The F1 of each label that was expected or predicted."""
    hits = Counter(name for one, other in zip(expected, predicted, strict=True) for name in set(one) & set(other))
    # Of a label, F1 = 2 TP / (2 TP + FP + FN); the denominator is how often it was expected plus predicted.
    counts = Counter(name for row in (*expected, *predicted) for name in set(row))
    return {name: 2 * hits[name] / counts[name] for name in sorted(counts)}


def _pearson(one: Sequence[float], other: Sequence[float]) -> float:
    a, b = _centered(one), _centered(other)
    norm = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def _mean(values: Collection[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _some(rows: Sequence[object]) -> None:
    if not rows:
        raise ValueError("nothing to compare")


def _centered(values: Sequence[float]) -> list[float]:
    mean = _mean(values)
    return [value - mean for value in values]
