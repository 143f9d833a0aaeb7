"""vLLM: /classify below /vllm, and loading and unloading of LoRA adapters where vLLM has it, below /v1.

Shapes and texts as in vLLM's entrypoints/pooling/classify and entrypoints/openai/models.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from server.api.access.principal import made_by
from server.api.compat.common import CLIENT_ERRORS, ask, error_answers, request_id
from server.api.deps import ClientDep, EngineDep, SettingsDep
from server.api.schemas import Body, ErrorBody
from server.api.task_schemas import Texts
from server.core import Activation, ClassifyOptions, LabelScore, Route, TextInput
from server.engine.engine import Engine
from server.engine.publishing import Upload
from server.errors import Conflict, InvalidRequest, TooLarge, UnknownAdapter
from server.settings import Settings
from server.store.folder import checkpoint_files
from server.store.formats.files import MAX_FILES


class VllmErrorInfo(BaseModel):
    """Why there is no answer."""

    message: str
    type: str
    param: str | None
    code: int


class VllmError(BaseModel):
    """An error."""

    error: VllmErrorInfo


TYPES: Mapping[str, str] = {
    "not_found_error": "NotFoundError",
    "invalid_user_input": "InvalidUserInput",
    "overloaded_error": "TooManyRequestsError",
    "rate_limit_error": "TooManyRequestsError",
    "authentication_error": "AuthenticationError",
    "permission_error": "PermissionDeniedError",
    "unavailable_error": "ServiceUnavailableError",
    "server_error": "InternalServerError",
}
"""Our types of errors -> vLLM's, of what is not `BadRequestError`."""


def shape(status: int, body: ErrorBody) -> tuple[int, dict[str, Any]]:
    """An error as vLLM answers it: 400 for whatever is wrong with a request."""
    status = CLIENT_ERRORS.get(status, status)
    type_ = TYPES.get(body.code, TYPES.get(body.type, "NotFoundError" if status == 404 else "BadRequestError"))
    info = VllmErrorInfo(message=body.message, type=type_, param=body.param, code=status)
    return status, VllmError(error=info).model_dump()


router = APIRouter(tags=["vLLM"], responses=error_answers(VllmError))

USER_INPUT = "invalid_user_input"
"""The code of what vLLM calls InvalidUserInput."""


class VllmClassifyBody(Body):
    """Texts to classify."""

    model: str
    input: Texts
    use_activation: bool | None = Field(None, description="Whether scores are probabilities; else they are logits.")
    truncate_prompt_tokens: Literal[-1] | None = Field(
        None, description="-1: texts that are too long are cut to what the backbone takes; else they get 400."
    )
    add_special_tokens: Literal[True] = True
    priority: Literal[0] = 0
    user: str | None = Field(None, max_length=1024, description="Has the same version while shares of traffic stay.")


class VllmClass(BaseModel):
    """The class of one text."""

    index: int
    label: str
    probs: list[float] = Field(description="In the order of the adapter's labels.")
    num_classes: int


class VllmUsage(BaseModel):
    """What the request cost."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class VllmClasses(BaseModel):
    """The classes of all texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[VllmClass]
    usage: VllmUsage


class LoadBody(Body):
    """A checkpoint on the server's disk, and what it is to be called."""

    lora_name: str
    lora_path: str = Field(description="Below the folder `ADAPTERD_LORA_PATH_ROOT`, absolute or relative to it.")
    load_inplace: bool = Field(False, description="Whether it may replace an adapter of this name.")


class UnloadBody(Body):
    """An adapter to take out of service."""

    lora_name: str
    lora_int_id: int | None = Field(None, description="Means nothing here.")


@router.post("/vllm/classify")
async def classify(body: VllmClassifyBody, client: ClientDep) -> VllmClasses:
    """Classify texts."""
    options = ClassifyOptions(activation=Activation.NONE if body.use_activation is False else None)
    inputs = list(map(TextInput, body.input))
    truncate = body.truncate_prompt_tokens is not None
    answer = await ask(Route.CLASSIFY, body.model, inputs, options, client, truncate=truncate, routing_key=body.user)
    assert answer.ref is not None, "an adapter was asked"
    order = (await client.engine.profile(answer.ref.name, answer.ref.version)).labels
    return VllmClasses(
        id=f"classify-{request_id()}",
        created=int(time.time()),
        model=body.model,
        data=[_class(index, labels, order) for index, labels in enumerate(answer.predictions)],
        usage=VllmUsage(prompt_tokens=answer.tokens, total_tokens=answer.tokens),
    )


def _class(index: int, labels: Sequence[LabelScore], order: Sequence[str]) -> VllmClass:
    """The best label, and all scores in `order`."""
    scores = {one.label: one.score for one in labels}
    probs = [scores[label] for label in order]
    return VllmClass(index=index, label=labels[0].label, probs=probs, num_classes=len(probs))


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load(body: LoadBody, engine: EngineDep, settings: SettingsDep) -> str:
    """Make an adapter of a checkpoint on the server's disk serve."""
    name = body.lora_name
    after = None if body.load_inplace else await _release_to_follow(name, engine)
    async with engine.upload_turn:
        files = await asyncio.to_thread(_read, body.lora_path, settings)
        try:
            await engine.publish(name, Upload(files, note="load_lora_adapter", after=after), by=made_by())
        except Conflict:
            if not body.load_inplace:
                await _release_to_follow(name, engine)  # which says so where somebody else has loaded one
            raise
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload(body: UnloadBody, engine: EngineDep) -> str:
    """Take an adapter out of service. Its versions and its history stay."""
    await engine.delete(body.lora_name, by=made_by(), note="unload_lora_adapter", after=None)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


async def _release_to_follow(name: str, engine: Engine) -> int:
    """The number of the last release of a name that nothing serves under, 0 for none. Raises InvalidRequest where
    something does. Asks the store, since what another server has just loaded is not known here yet."""
    try:
        [last] = await engine.history(name, before=None, limit=1)
    except UnknownAdapter:
        return 0
    if last.deleted:
        return last.number
    raise InvalidRequest(
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
        param="lora_name",
        code=USER_INPUT,
    )


def _read(lora_path: str, settings: Settings) -> list[tuple[str, bytes]]:
    """One file, or those of a folder that belong to a checkpoint, below the one folder from which clients may load.

    Where links lead counts, not where they lie.
    """
    if settings.lora_path_root is None:
        raise _refusal(
            "lora_path: this server loads nothing from its disk. Set ADAPTERD_LORA_PATH_ROOT to the folder from which "
            "it may, or upload the files with PUT /admin/adapters/{name}"
        )
    try:
        root = Path(settings.lora_path_root).resolve(strict=True)
        path = _below(root, root / lora_path, lora_path)
        if not path.exists():
            raise UnknownAdapter(f"No adapter found for {lora_path[:200]}", param="lora_path")
        inside = sorted(islice(checkpoint_files(path), MAX_FILES + 1)) if path.is_dir() else [(path.name, path)]
        if len(inside) > MAX_FILES:
            raise _refusal(f"lora_path: more than {MAX_FILES} files")
        found = {name: _below(root, one, name) for name, one in inside}
        plain = {name: file for name, file in found.items() if file.is_file()}
        if sum(file.stat().st_size for file in plain.values()) > settings.max_upload_bytes:
            raise TooLarge(f"the files are over the limit of {settings.max_upload_bytes} bytes", param="lora_path")
        return [(name, file.read_bytes()) for name, file in plain.items()]
    except (OSError, ValueError, RuntimeError) as error:  # no such root, no right to read, a null character, a loop
        raise _refusal(f"lora_path: {lora_path[:200]!r} cannot be read") from error


def _below(root: Path, path: Path, name: str) -> Path:
    """Where `path` leads. Raises InvalidRequest unless that is below `root`."""
    resolved = path.resolve()
    if root not in resolved.parents:
        raise _refusal(f"lora_path: {name[:200]!r} is not below the folder from which this server may load")
    return resolved


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="lora_path", code=USER_INPUT)
