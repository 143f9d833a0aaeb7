"""Which modules an adapter targets, as PEFT's configurations say it."""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import regex
from pydantic import Field

from server.adapters.base import MethodConfig
from server.core import BackboneSpec, Site, SiteKind, is_target
from server.errors import InvalidAdapter

ALL_LINEAR = "all-linear"

MATCH_SECONDS = 1.0
"""Time for all matches of one option. A pattern that somebody uploads may take exponentially long on names of fifty
characters, or somewhat long many times."""

MAX_TARGETS = 10_000
MAX_PATTERNS = 1_000
MAX_PATTERN = 10_000
"""Characters of a regular expression."""

MAX_REPEATS = 1_000
"""Copies that a pattern's `{n}` ask for, multiplied as if all were nested. They are made before anything is matched."""

_REPEAT = re.compile(r"\{\s*0*([0-9]+)")

Rank = Annotated[int, Field(ge=1, le=2**128)]
"""Of matrices. Which one it can be, their shapes tell; a number beyond what a float holds cannot be divided by."""

SELECTORS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""PEFT's options that say together which modules are meant."""


class TargetConfig(MethodConfig):
    """Target modules: a target matches a module whose path is the target or ends in `.target`."""

    target_modules: tuple[str, ...] = Field(min_length=1, max_length=MAX_TARGETS)

    def sites(self, spec: BackboneSpec, kinds: Iterable[SiteKind] = (SiteKind.LINEAR,)) -> list[Site]:
        """The sites that the targets name, in the model's order; each target has to name at least one."""
        return find_sites(self.target_modules, spec, kinds)


def find_sites(
    targets: Iterable[str],
    spec: BackboneSpec,
    kinds: Iterable[SiteKind],
    field: str = "target_modules",
) -> list[Site]:
    """The sites of some kinds that the targets name. Raises InvalidAdapter for a target that names none."""
    candidates = [site for site in spec.sites if site.kind in kinds]
    found: set[Site] = set()
    for target in targets:
        hits = [site for site in candidates if is_target(site.name, target)]
        if not hits:
            names = " or ".join(NOUNS[kind] for kind in kinds)
            raise InvalidAdapter(
                f"target module {target!r} is not {names} of the backbone ({spec.model_type})",
                param=field,
                code="unknown_target",
            )
        found.update(hits)
    return [site for site in candidates if site in found]


NOUNS = {
    SiteKind.LINEAR: "a linear layer",
    SiteKind.LINEAR_INPUT: "a linear layer",
    SiteKind.EMBEDDING: "an embedding",
    SiteKind.NORM: "a normalization layer",
}


def select(
    options: Mapping[str, Any], spec: BackboneSpec, kinds: Iterable[SiteKind] = (SiteKind.LINEAR,)
) -> dict[str, Any]:
    """The options with PEFT's selectors, regular expressions and all, made into an explicit `target_modules`.

    Targets that match nothing are dropped, as PEFT does, as long as one matches. Source: PEFT's
    `check_target_module_exists`; it matches against names that carry the model's prefix, such as `bert.`.
    """
    rest = {name: value for name, value in options.items() if name not in SELECTORS}
    chosen = options.get("target_modules")
    if chosen is None:
        return rest
    paths = [site.name for site in spec.sites if site.kind in kinds]
    if chosen == ALL_LINEAR:
        paths = [site.name for site in spec.sites_of(SiteKind.LINEAR)]
        names = paths
    else:
        wanted = _matcher("target_modules", chosen, spec)
        names = [path for path in paths if wanted(path)]
    by_layer = isinstance(chosen, list | tuple) and options.get("layers_to_transform") not in (None, [], ())
    if by_layer:  # a whole path says its layer itself
        in_layers = _in_layers(options, spec)
        names = [path for path in names if _whole(path, spec) in chosen or in_layers(path)]
    if options.get("exclude_modules"):
        excluded = _matcher("exclude_modules", options["exclude_modules"], spec)
        names = [path for path in names if not excluded(path)]
    if not names:
        raise InvalidAdapter(
            f"none of the target_modules {_short(chosen)} is {' or '.join(NOUNS[kind] for kind in kinds)} of the "
            f"backbone ({spec.model_type})",
            param="target_modules",
            code="unknown_target",
        )
    return rest | {"target_modules": _shortest(names, chosen, paths, spec)}


def with_default(options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
    """The options, with the attention's query and value as targets where they name none, as in LoRA's paper."""
    targets = spec.named("query", "value") or spec.named("query_key_value")
    return {"target_modules": targets or None, **options}


def per_target(options: Mapping[str, Any], field: str, paths: Iterable[str], spec: BackboneSpec) -> dict[str, Any]:
    """PEFT's `rank_pattern` and the like, patterns -> values, as module paths -> values.

    Source: PEFT's `get_pattern_key`: the first pattern that the end of a name matches after a dot counts.
    """
    patterns = options.get(field) or {}
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise InvalidAdapter(
            f"{field} has to map names to numbers, at most {MAX_PATTERNS} of them",
            param=field,
            code="unsupported_option",
        )
    values = {}
    timed = _Timed(field)
    for path in paths:
        for pattern, value in patterns.items():
            if timed.fullmatch(rf"(.*\.)?({pattern})", _whole(path, spec)):
                values[path] = value
                break
    return values


def check_paths(field: str, paths: Iterable[str], sites: Iterable[Site]) -> None:
    """Refuses a path in an option of a stored configuration that is not one of the targets: it would mean nothing."""
    known = {site.name for site in sites}
    for path in paths:
        if path not in known:
            raise InvalidAdapter(
                f"{field}: {_short(path)} is not the whole path of a target module", param=field, code="unknown_target"
            )


def matching(field: str, targets: Any, paths: Iterable[str], spec: BackboneSpec) -> list[str]:
    """The paths that a list of targets, or a regular expression, names."""
    matches = _matcher(field, targets, spec)
    return [path for path in paths if matches(path)]


def _whole(path: str, spec: BackboneSpec) -> str:
    return f"{spec.prefix}.{path}" if spec.prefix else path


def _matcher(field: str, targets: Any, spec: BackboneSpec) -> Callable[[str], bool]:
    if isinstance(targets, str):
        timed = _Timed(field)
        return lambda path: timed.fullmatch(targets, _whole(path, spec)) is not None
    listed = isinstance(targets, list | tuple) and len(targets) <= MAX_TARGETS
    if not listed or not all(isinstance(target, str) for target in targets):
        raise InvalidAdapter(
            f"{field} = {_short(targets)} is not supported; supported: a list of module names, a regular expression"
            + (f" or {ALL_LINEAR!r}" if field == "target_modules" else ""),
            param=field,
            code="unsupported_option",
        )
    return lambda path: any(is_target(_whole(path, spec), target) for target in targets)


def _in_layers(options: Mapping[str, Any], spec: BackboneSpec) -> Callable[[str], bool]:
    """Whether a path lies in the layers that the options name."""
    layers = options["layers_to_transform"]
    layers = [layers] if isinstance(layers, int) else layers
    patterns = options.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(layers, list | tuple) or not isinstance(patterns, list | tuple) or len(patterns) > MAX_PATTERNS:
        raise InvalidAdapter(
            "layers_to_transform has to be a layer's number or a list of them, layers_pattern a name or a list",
            param="layers_to_transform",
            code="unsupported_option",
        )
    anchored = [rf"(?:^|.*?\.){pattern}\.(?P<adapterd_layer>\d{{1,6}})\." for pattern in patterns]
    anchored = anchored or [r".*?\.[^.]*\.(?P<adapterd_layer>\d{1,6})\."]
    timed = _Timed("layers_pattern")

    def matches(path: str) -> bool:
        found = (timed.match(pattern, _whole(path, spec)) for pattern in anchored)
        number = next((one["adapterd_layer"] for one in found if one), None)
        return number is not None and int(number) in layers

    return matches


class _Timed:
    """Regular expressions of one option, within a time for all of them."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._until = time.monotonic() + MATCH_SECONDS

    def match(self, pattern: str, name: str) -> Any:
        """As `re.match`."""
        return self._search(regex.match, pattern, name)

    def fullmatch(self, pattern: str, name: str) -> Any:
        """As `re.fullmatch`."""
        return self._search(regex.fullmatch, pattern, name)

    def _search(self, search: Callable[..., Any], pattern: str, name: str) -> Any:
        left = self._until - time.monotonic()
        reason = "take too long to match, or ask for too many repeats"
        try:
            if left > 0 and len(pattern) <= MAX_PATTERN and _repeats(pattern) <= MAX_REPEATS:
                return search(pattern, name, timeout=left)
        except TimeoutError:
            pass
        except (regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
            reason = f"are not regular expressions: {error}"
        raise InvalidAdapter(
            f"{self._field}: patterns such as {_short(pattern)} {reason}", param=self._field, code="unsupported_option"
        )


def _repeats(pattern: str) -> int:
    """An upper bound of how often a part of a pattern is copied when it is compiled."""
    counts = _REPEAT.findall(pattern)
    return math.prod(max(int(count), 1) if len(count) < 10 else MAX_REPEATS + 1 for count in counts)


def _shortest(names: list[str], chosen: Any, paths: list[str], spec: BackboneSpec) -> tuple[str, ...]:
    """The chosen list, where it says the same as the whole names: a manifest is read by people too."""
    if isinstance(chosen, list | tuple):
        short = {target.removeprefix(f"{spec.prefix}.") for target in chosen}
        short = {target for target in short if any(is_target(path, target) for path in paths)}
        if {path for path in paths if any(is_target(path, target) for target in short)} == set(names):
            return tuple(sorted(short))
    return tuple(names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
