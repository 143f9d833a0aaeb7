"""How good answers are."""

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)


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


def answers(expected: Sequence[Sequence[str]], predicted: Sequence[str]) -> Report:
    """Texts that answer questions, by SQuAD 2.0's script: `exact` and `f1` over words, each against the right answer
    that is nearest. Case, punctuation, articles and spaces do not count; an empty text is no answer."""
    _some(expected)
    exact, f1 = [], []
    for right, answer in zip(expected, predicted, strict=True):
        words = _words(answer)
        wanted = [one for one in map(_words, right) if one] or [[]]
        exact.append(float(words in wanted))
        f1.append(max(_overlap(one, words) for one in wanted))
    return Report(len(expected), {"exact": _mean(exact), "f1": _mean(f1)})


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


def _words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return ARTICLES.sub(" ", plain).split()


def _overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of two bags of words; of an empty one, whether the other is empty too."""
    if not one or not other:
        return float(one == other)
    return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other))


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
