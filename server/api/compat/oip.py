"""The Open Inference Protocol (KServe v2) over HTTP with JSON: a model is an adapter, a version is one of its.

https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md. The extension for binary
tensors is not spoken: binary inputs are refused, and outputs are JSON, which says so itself, also where binary ones are
asked for.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field

import server
from server.api import tasks
from server.api.compat.common import CLIENT_ERRORS, error_answers, parsed, request_id
from server.api.deps import ClientDep, EngineDep
from server.api.schemas import Body, ErrorBody
from server.api.task_schemas import AnswerBody, ClassifyBody, EmbedBody, TagBody, TaskBody
from server.core import AnswerSpan, Entity, Route
from server.errors import InvalidRequest


class OipError(BaseModel):
    """An error."""

    error: str


def shape(status: int, body: ErrorBody) -> tuple[int, dict[str, Any]]:
    """An error as the protocol has it: 400 for whatever is wrong with a request."""
    hint = BINARY if body.code == "invalid_json" else ""  # which is what a JSON with tensors behind it is taken for
    return CLIENT_ERRORS.get(status, status), OipError(error=body.message + hint).model_dump()


BINARY = "; binary tensors are not taken: send data as JSON"


# Triton's client sends no Content-Type. Elsewhere that is refused, as it lets any web page make a browser ask; but
# nothing here changes anything.
router = APIRouter(
    prefix="/v2",
    tags=["Open Inference Protocol"],
    responses=error_answers(OipError),
    strict_content_type=False,
)

TEXT, PAIR = "text", "text_pair"
"""The inputs; of a question to a text, the text is the pair."""


def _flat(data: Any) -> Any:
    """Data may be nested as the tensor is."""
    if isinstance(data, list) and any(isinstance(one, list) for one in data):
        return list(chain.from_iterable(one if isinstance(one, list) else [one] for one in data))
    return data


class Input(Body):
    """A tensor of texts."""

    name: Literal["text", "text_pair"]
    shape: list[int] = Field(description="[n] or [n, 1]")
    datatype: Literal["BYTES"]
    parameters: dict[str, Any] | None = None
    data: Annotated[list[str], BeforeValidator(_flat)]


class Output(Body):
    """A tensor that is wanted."""

    name: str
    parameters: dict[str, Any] | None = Field(None, description="`binary_data` is a wish that is not granted.")


class InferBody(Body):
    """A request."""

    id: str | None = Field(None, max_length=1024)
    parameters: dict[str, Any] | None = Field(
        None, description="What the route of the adapter's task takes beside its inputs: `top_k`, `truncate` and so on."
    )
    inputs: list[Input] = Field(min_length=1, max_length=2)
    outputs: list[Output] | None = Field(None, max_length=8, description="All where none is named.")


class Tensor(BaseModel):
    """An output."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class InferAnswer(BaseModel):
    """The outputs."""

    model_name: str
    model_version: str
    id: str
    outputs: list[Tensor]


class TensorMetadata(BaseModel):
    """What a tensor is."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str = "adapterd"
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    """What this server is."""

    name: str = "adapterd"
    version: str = server.__version__
    extensions: list[str] = []


@dataclass(frozen=True, slots=True)
class _Output:
    datatype: str
    shape: list[int]
    row: Callable[[Any], list[Any] | str]
    """A prediction as a row of the tensor, or as its one value."""

    def tensor(self, name: str, predictions: Sequence[Any]) -> Tensor:
        rows = list(map(self.row, predictions))
        data = list(chain.from_iterable(rows)) if isinstance(rows[0], list) else rows
        shape = [len(rows), len(rows[0])] if isinstance(rows[0], list) else [len(rows)]
        return Tensor(name=name, shape=shape, datatype=self.datatype, data=data)


def _json(found: Sequence[Entity] | Sequence[AnswerSpan]) -> str:
    return json.dumps(list(map(asdict, found)), ensure_ascii=False)


OUTPUTS: Mapping[Route, Mapping[str, _Output]] = {
    Route.CLASSIFY: {
        "labels": _Output("BYTES", [-1, -1], lambda labels: [one.label for one in labels]),
        "scores": _Output("FP32", [-1, -1], lambda labels: [one.score for one in labels]),
    },
    Route.TAG: {"entities": _Output("BYTES", [-1], _json)},
    Route.ANSWER: {"answers": _Output("BYTES", [-1], _json)},
    Route.EMBED: {"embeddings": _Output("FP32", [-1, -1], list)},
}
"""The outputs of each task: labels and scores best first; of entities and answers, a JSON list for each text."""

BODIES: Mapping[Route, type[TaskBody]] = {
    Route.CLASSIFY: ClassifyBody,
    Route.TAG: TagBody,
    Route.ANSWER: AnswerBody,
    Route.EMBED: EmbedBody,
}

TAKEN = {"adapter", "model", "adapters", "version", "inputs"}
"""What a body says in its path and its inputs, not among its parameters."""

BINARY_OUTPUT = "binary_data_output"


@router.get("")
async def server_metadata() -> ServerMetadata:
    """What this server is."""
    return ServerMetadata()


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/health/ready")
async def ready(engine: EngineDep) -> dict[str, bool]:
    """Requests can be answered; 503 where they cannot."""
    engine.check_ready()
    return {"ready": True}


@router.get("/models/{name}")
@router.get("/models/{name}/versions/{version}")
async def model_metadata(name: str, engine: EngineDep, version: str | None = None) -> ModelMetadata:
    """What an adapter takes and gives."""
    profile = await engine.profile(name, version)
    return ModelMetadata(
        name=name,
        versions=[profile.version],
        inputs=[TensorMetadata(name=one, datatype="BYTES", shape=[-1]) for one in (TEXT, PAIR)],
        outputs=[
            TensorMetadata(name=one, datatype=output.datatype, shape=output.shape)
            for one, output in OUTPUTS[profile.task.route].items()
        ],
    )


@router.get("/models/{name}/ready")
@router.get("/models/{name}/versions/{version}/ready")
async def model_ready(name: str, engine: EngineDep, version: str | None = None) -> dict[str, Any]:
    """An adapter can be asked; it is loaded when it is. 503 where nothing can."""
    engine.check_ready()
    await engine.profile(name, version)
    return {"name": name, "ready": True}


@router.post("/models/{name}/infer")
@router.post("/models/{name}/versions/{version}/infer")
async def infer(
    name: str,
    body: InferBody,
    client: ClientDep,
    version: str | None = None,
) -> InferAnswer:
    """Do what the adapter does: classify, find entities, answer, embed."""
    parameters = body.parameters or {}
    if taken := TAKEN & parameters.keys():
        param = f"parameters.{min(taken)}"
        raise InvalidRequest(f"{param}: the path and the inputs say that", param=param)
    route = (await client.engine.profile(name, version)).task.route
    wanted = _wanted(body.outputs or (), route)
    options = {key: value for key, value in parameters.items() if key != BINARY_OUTPUT}
    inputs = _inputs(body.inputs, route)
    asked = parsed(BODIES[route], options | {"adapter": name, "version": version, "inputs": inputs})
    [answer] = await tasks.ask(asked, route, client)
    assert answer.ref is not None, "an adapter was asked"
    return InferAnswer(
        model_name=name,
        model_version=answer.ref.version,
        id=request_id() if body.id is None else body.id,
        outputs=[output.tensor(one, answer.predictions) for one, output in wanted.items()],
    )


def _wanted(outputs: Sequence[Output], route: Route) -> Mapping[str, _Output]:
    known = OUTPUTS[route]
    for output in outputs:
        if output.name not in known:
            raise InvalidRequest(
                f"outputs: there is no {output.name[:100]!r}; the adapter gives {', '.join(known)}", param="outputs"
            )
    return {one.name: known[one.name] for one in outputs} or known


def _inputs(inputs: Sequence[Input], route: Route) -> list[Any]:
    """Texts, or texts and pairs, as the route of the adapter's task takes them."""
    tensors: dict[str, list[str]] = {one.name: _texts(one) for one in inputs}
    texts, pairs = tensors.get(TEXT), tensors.get(PAIR)
    if texts is None or len(tensors) < len(inputs):
        raise InvalidRequest(f"inputs: one {TEXT} is needed, and at most one {PAIR}", param="inputs")
    if pairs is None and route is not Route.ANSWER:
        return list(texts)
    if pairs is None or len(pairs) != len(texts):
        raise InvalidRequest(f"inputs: {PAIR} has to have as many texts as {TEXT}", param="inputs")
    first, second = ("question", "context") if route is Route.ANSWER else (TEXT, PAIR)
    return [{first: text, second: pair} for text, pair in zip(texts, pairs, strict=True)]


def _texts(tensor: Input) -> list[str]:
    if tensor.shape not in ([len(tensor.data)], [len(tensor.data), 1]):
        raise InvalidRequest(
            f"inputs: {tensor.name} has {len(tensor.data)} texts, which is not shape {tensor.shape[:8]}", param="inputs"
        )
    return tensor.data
