"""/admin/adapters: uploading, listing and deleting adapters while the server runs."""

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from server.api.deps import EngineDep
from server.api.errors import RESPONSES
from server.api.schemas import AdapterDetail, AdapterList, AdapterSummary, DeleteAnswer, UploadAnswer
from server.engine.engine import Described
from server.errors import InvalidRequest
from server.store.store import check_name

router = APIRouter(prefix="/admin/adapters", tags=["admin"], responses=RESPONSES)

BY = "http"
"""Who a release says that it was made by; there are no accounts."""


def adapter_name(name: str, request: Request) -> str:
    """The name in the path. Starlette drops a newline at its end, which would make another name of it."""
    return check_name(name if request.scope["path"].endswith(f"/{name}") else f"{name}\n")


NameDep = Annotated[str, Depends(adapter_name)]


class Upload(BaseModel):
    """A checkpoint as a multipart form."""

    model_config = ConfigDict(extra="forbid")

    files: list[UploadFile]
    labels: str | None = None


@router.get("")
async def list_adapters(
    engine: EngineDep, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> AdapterList:
    """The adapters that serve, by name."""
    described, following = await engine.page(after=after, limit=limit)
    return AdapterList(adapters=[_summary(one) for one in described], next=following)


# `:path`, so that a name with slashes in it reaches the check that says what a name may be.
@router.get("/{name:path}")
async def get_adapter(name: NameDep, engine: EngineDep) -> AdapterDetail:
    """An adapter's release and manifest."""
    described, manifest = await engine.describe(name)
    return AdapterDetail(
        **_summary(described).model_dump(), manifest=manifest.model_dump(mode="json", exclude_none=True)
    )


@router.put("/{name:path}", status_code=201)
async def put_adapter(
    name: NameDep,
    form: Annotated[Upload, Form(media_type="multipart/form-data")],
    engine: EngineDep,
    response: Response,
) -> UploadAnswer:
    """Upload a checkpoint and make it serve: its files as they are, or one .zip or .tar.gz of them.

    201 where a new release was made, 200 where the same content was serving already.
    """
    labels = _labels(form.labels)
    async with engine.upload_turn:
        uploads = [(file.filename or "", await file.read()) for file in form.files]
        published = await engine.publish(name, uploads, labels, by=BY, note="upload")
    if not published.created:
        response.status_code = 200
    manifest = published.manifest
    return UploadAnswer(
        adapter=name,
        version=published.version,
        release=published.release.number,
        created=published.created,
        method=manifest.method,
        also=[part.method for part in manifest.also],
        task=manifest.task,
        labels=list(manifest.labels),
        source=manifest.source,
    )


@router.delete("/{name:path}")
async def delete_adapter(name: NameDep, engine: EngineDep) -> DeleteAnswer:
    """Take an adapter out of service. Its versions and its history stay in the store."""
    release = await engine.delete(name, by=BY, note="delete")
    return DeleteAnswer(adapter=name, release=release.number)


def _summary(described: Described) -> AdapterSummary:
    return AdapterSummary(
        name=described.name,
        version=described.version,
        release=described.release.number,
        released_at=described.release.created_at,
        resident=described.resident,
    )


def _labels(field: str | None) -> list[str] | None:
    if field is None:
        return None
    try:
        return TypeAdapter(list[str]).validate_json(field, strict=True)
    except ValidationError as error:
        raise InvalidRequest("labels: a JSON list of strings is needed", param="labels") from error
