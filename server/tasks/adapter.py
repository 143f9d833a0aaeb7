"""A whole adapter: a method's weights and a task's head. Serving and training both build it here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from server.adapters import METHODS
from server.adapters.base import (
    AdapterWeights,
    Method,
    MethodConfig,
    bind_tensors,
    check_tensors,
    init_tensors,
    tensor_shapes,
)
from server.core import BackboneSpec
from server.errors import InvalidAdapter
from server.tasks import TASKS
from server.tasks.base import HEAD, AnyTask, HeadConfig

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class TaskAdapter:
    """An adapter on the backbone's device, ready to run."""

    weights: AdapterWeights
    task: AnyTask
    head: Any
    labels: tuple[str, ...]
    nbytes: int
    """Memory of its tensors."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """An adapter without its numbers, known to fit a backbone."""

    method: Method
    config: MethodConfig
    task: AnyTask
    head: HeadConfig
    labels: tuple[str, ...]
    spec: BackboneSpec

    @classmethod
    def check(
        cls,
        *,
        method: str,
        config: Mapping[str, Any],
        task: str,
        head: Mapping[str, Any],
        labels: Sequence[str],
        spec: BackboneSpec,
    ) -> "Blueprint":
        """Names and options to a blueprint. Raises InvalidAdapter naming what is unknown or does not fit."""
        known_method = _known("method", method, METHODS)
        known_task = _known("task", task, TASKS)
        blueprint = cls(
            known_method,
            _parsed("config", known_method.Config, config),
            known_task,
            _parsed("head", known_task.Config, head),
            tuple(labels),
            spec,
        )
        known_task.check(blueprint.head, blueprint.labels, spec)
        known_method.sites(blueprint.config, spec)
        return blueprint

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Artifact tensor name -> shape, the head's included."""
        return tensor_shapes(self.method, self.config, self.spec) | self.task.shapes(self.head, self.labels, self.spec)

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuses any tensor that is missing, unused, misshapen or not finite, by its name."""
        check_tensors(tensors, self.shapes())

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh float32 tensors for training."""
        return init_tensors(self.method, self.config, self.spec, generator) | self.task.init(
            self.head, self.labels, self.spec, generator
        )

    def bind(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> TaskAdapter:
        """Prepares checked tensors for a backbone on `device` in `dtype`. Differentiable.

        The head stays as precise as it was stored: its outputs are what the caller sees.
        """
        placed = {
            name: tensor.to(device) if name.startswith(HEAD) else tensor.to(device, dtype)
            for name, tensor in tensors.items()
        }
        return TaskAdapter(
            weights=bind_tensors(self.method, self.config, placed, self.spec),
            task=self.task,
            head=self.task.bind(self.head, placed),
            labels=self.labels,
            nbytes=sum(tensor.nbytes for tensor in placed.values()),
        )


def _known(field: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise InvalidAdapter(
            f"{field} {name!r} is not supported; supported: {', '.join(table)}",
            param=field,
            code=f"unsupported_{field}",
        )
    return table[name]


def _parsed(field: str, model: type[M], options: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join((field, *map(str, first["loc"])))
        raise InvalidAdapter(f"{where}: {first['msg']}", param=where, code="unsupported_option") from error
