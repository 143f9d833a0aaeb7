"""Tasks about a text as a whole: one vector per text goes in, one vector of outputs comes out."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from server.adapters.states import TextStates
from server.core import BackboneSpec, Pooling, Prediction, TextInput, WindowPooling
from server.errors import InvalidAdapter
from server.tasks import head as heads
from server.tasks.base import ConfigT, ExampleT, HeadT, LayeredTask, Numbers, OptionsT, Task, Window
from server.tasks.head import Layers, LayersConfig


class PooledConfig(LayersConfig):
    """The head's layers, and the vector that they read."""

    pooling: Pooling = Pooling.MEAN


class PooledHead(NamedTuple):
    """What is read, and what is made of it."""

    pooling: Pooling
    layers: Layers


PooledConfigT = TypeVar("PooledConfigT", bound=PooledConfig)


class PooledTask(Task[ConfigT, HeadT, OptionsT, ExampleT]):
    """A task whose outputs are one vector per text, which is all that an answer takes."""

    @abstractmethod
    def decode(self, outputs: Tensor, config: ConfigT, labels: Sequence[str], options: OptionsT) -> list[Any]:
        """Raw outputs [texts, outputs], float32 on the CPU, as answers, one per text."""

    def read(
        self,
        text: TextInput,
        windows: Sequence[Window],
        config: ConfigT,
        labels: Sequence[str],
        options: OptionsT,
        pooling: WindowPooling,
    ) -> Prediction:
        """The answer to the mean, or the largest, of each output over the windows."""
        outputs = torch.stack([window.output for window in windows])
        # in float32, the sum of finite outputs may not be finite
        pooled = outputs.double().mean(0).float() if pooling is WindowPooling.MEAN else outputs.amax(0)
        prediction: Prediction = self.decode(pooled[None], config, labels, options)[0]
        return prediction


class TextTask(
    LayeredTask[PooledConfigT, PooledHead, OptionsT, ExampleT],
    PooledTask[PooledConfigT, PooledHead, OptionsT, ExampleT],
):
    """Layers on a pooled vector."""

    Config = PooledConfig

    def check(self, config: PooledConfigT, labels: Sequence[str], spec: BackboneSpec) -> None:
        """A pooling that the backbone has."""
        need_pooling(config.pooling, spec)

    def bind(self, config: PooledConfigT, tensors: Mapping[str, Tensor]) -> PooledHead:
        """The tensors as float32."""
        return PooledHead(config.pooling, heads.bind(config, tensors))

    def apply(self, head: PooledHead, states: TextStates, start: int, end: int) -> Tensor:
        """Outputs [texts, outputs]."""
        return head.layers(states.pooled(head.pooling)[start:end])


def scored(labels: Sequence[str], top_k: int | None) -> Numbers:
    """An output of each label, and a score of each or of the best."""
    return Numbers(len(labels), min(top_k or len(labels), len(labels)))


def need_pooling(pooling: Pooling, spec: BackboneSpec) -> None:
    """Raises InvalidAdapter for a pooling that the backbone does not have."""
    if pooling not in spec.poolings:
        raise InvalidAdapter(
            f"the head reads the backbone's {pooling}, but the checkpoint of backbone {spec.name!r} has none, so its "
            "answers cannot be reproduced",
            param="pooling",
            code="no_pooler",
        )
