"""Activation functions by the names that configurations use."""

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2CLS, ACT2FN

LEARNED = ("prelu", "xielu")
"""Activations with parameters of their own, which no format of adapter checkpoints stores."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leakyrelu": F.leaky_relu,  # AdapterHub's own name
    **{name: ACT2FN[name] for name in ACT2CLS if name not in LEARNED},
}
"""transformers' table, which PEFT and AdapterHub take names from."""


def _known(name: str) -> str:
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"{name[:40]!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}")
    return name.lower()


ActivationName = Annotated[str, AfterValidator(_known)]
"""A name in the table, in lower case."""
