"""The wire shapes of other servers, so that their clients work with this one. Each file only translates: what is asked
of it, it asks of the routes of tasks. A peer is a file beside these and its lines in both tables."""

from collections.abc import Mapping

from fastapi import APIRouter

from server.api.compat import hf, oip, openai, tei, vllm
from server.api.errors import Shape

ROUTERS: tuple[APIRouter, ...] = (hf.router, tei.router, vllm.router, openai.router, oip.router)

SHAPES: Mapping[str, Shape] = {
    "/models": hf.shape,
    "/tei": tei.shape,
    "/vllm": vllm.shape,
    "/v1": openai.shape,
    "/v1/load_lora_adapter": vllm.shape,
    "/v1/unload_lora_adapter": vllm.shape,
    "/v2": oip.shape,
}
"""Path -> how errors below it look."""
