"""Series: what they count, and how many of them there can be."""

from server.metrics import OTHER, Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def count(metrics: Metrics, name: str) -> int:
    """How many series of a name there are."""
    return sum(sample.name == name for family in metrics.registry.collect() for sample in family.samples)


def test_the_first_adapters_keep_their_series_and_the_rest_share_one() -> None:
    metrics = Metrics(adapters=2)
    for name in ("a", "b", "c", "d", "a", "c"):
        metrics.answered.add(name, texts=1, tokens=10)
    totals = {name: value(metrics, "adapterd_texts_total", adapter=name) for name in ("a", "b", "c", "d", OTHER)}
    assert totals == {"a": 2, "b": 1, "c": None, "d": None, OTHER: 3}
    assert value(metrics, "adapterd_tokens_total", adapter=OTHER) == 30


def test_an_adapter_called_other_makes_no_second_series() -> None:
    metrics = Metrics(adapters=1)
    for name in (OTHER, "b"):
        metrics.answered.add(name, texts=1, tokens=1)
    assert count(metrics, "adapterd_texts_total") == 1
    assert value(metrics, "adapterd_texts_total", adapter=OTHER) == 2


def test_without_series_of_their_own_all_adapters_are_summed() -> None:
    metrics = Metrics(adapters=0)
    metrics.answered.add("a", texts=3, tokens=1)
    assert value(metrics, "adapterd_texts_total", adapter=OTHER) == 3


def test_shadow_versions_are_bounded_too() -> None:
    metrics = Metrics(adapters=2)
    for version in ("1", "2", "3", "4"):
        metrics.count_shadow("a", version, "agreed", 1)
    metrics.count_shadow("a", "1", "disagreed", 1)
    assert value(metrics, "adapterd_shadow_texts_total", adapter="a", version="2", outcome="agreed") == 1
    assert value(metrics, "adapterd_shadow_texts_total", adapter="a", version="1", outcome="disagreed") == 1
    assert value(metrics, "adapterd_shadow_texts_total", adapter=OTHER, version=OTHER, outcome="agreed") == 2
    assert count(metrics, "adapterd_shadow_texts_total") == 4
