"""Adapter methods. Adding one is a file beside these and a line in METHODS."""

from server.adapters.base import Method
from server.adapters.bottleneck import Bottleneck
from server.adapters.lora import Lora

METHODS: dict[str, Method] = {
    "lora": Lora(),
    "bottleneck": Bottleneck(),
}
