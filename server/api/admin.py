"""/admin: uploading, releasing and looking after adapters while the server runs."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile
from pydantic import BaseModel, ConfigDict, FailFast, TypeAdapter, ValidationError

from server.api.access.principal import made_by
from server.api.answers import (
    adapter_detail,
    adapter_summary,
    collect_answer,
    release_answer,
    release_list,
    upload_answer,
    version_info,
)
from server.api.deps import EngineDep
from server.api.errors import RESPONSES
from server.api.schemas import (
    AdapterDetail,
    AdapterList,
    AdapterSummary,
    After,
    CollectAnswer,
    CollectBody,
    DeleteAnswer,
    Note,
    PinAnswer,
    ReleaseAnswer,
    ReleaseBody,
    ReleaseList,
    RollbackBody,
    UploadAnswer,
    VerifyAnswer,
    VersionList,
)
from server.engine.engine import Described
from server.engine.publishing import Upload
from server.errors import InvalidRequest
from server.store.names import check_name, check_version

PREFIX = "/admin"

router = APIRouter(prefix=PREFIX, tags=["admin"], responses=RESPONSES)


async def adapter_name(name: str, request: Request) -> str:
    """The name in the path. Starlette drops a newline at its end, which would make another name of it."""
    return check_name(f"{name}\n" if request.scope["path"].endswith("\n") else name)


NameDep = Annotated[str, Depends(adapter_name)]


class UploadForm(BaseModel):
    """A checkpoint as a multipart form."""

    model_config = ConfigDict(extra="forbid")

    files: list[UploadFile]
    labels: str | None = None
    eval: UploadFile | None = None
    note: Note = ""


@router.get("/adapters")
async def list_adapters(
    engine: EngineDep, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> AdapterList:
    """The adapters that serve, by name."""
    page = await engine.page(after=after, limit=limit)
    return AdapterList(adapters=[_summary(one) for one in page.adapters], damaged=page.damaged, next=page.next)


@router.post("/gc")
async def collect_garbage(body: CollectBody, engine: EngineDep) -> CollectAnswer:
    """Remove versions that no recent release names. Histories stay."""
    removed = await engine.collect(
        name=None if body.adapter is None else check_name(body.adapter),
        keep=body.keep,
        min_age=timedelta(seconds=body.min_age_seconds),
        dry_run=body.dry_run,
    )
    return collect_answer(removed, dry_run=body.dry_run)


# `:path`, so that a name with slashes in it reaches the check that says what a name may be; and what is below a name
# comes before the name itself.
@router.get("/adapters/{name:path}/releases")
async def list_releases(
    name: NameDep,
    engine: EngineDep,
    before: Annotated[int | None, Query(ge=1)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ReleaseList:
    """The adapter's history, the latest release first."""
    return release_list(name, await engine.history(name, before=before, limit=limit + 1), limit)


@router.post("/adapters/{name:path}/releases", status_code=201)
async def make_release(name: NameDep, body: ReleaseBody, engine: EngineDep) -> ReleaseAnswer:
    """Say which stored versions serve from here on, with which shares of the traffic."""
    return release_answer(name, await engine.release(name, body.plan(), by=made_by(), note=body.note, after=body.after))


@router.post("/adapters/{name:path}/rollback", status_code=201)
async def rollback(name: NameDep, engine: EngineDep, body: RollbackBody | None = None) -> ReleaseAnswer:
    """Serve again what served before. A roll-back is a release; rolling back again goes further back."""
    body = body or RollbackBody()
    return release_answer(name, await engine.rollback(name, to=body.to, by=made_by(), note=body.note, after=body.after))


@router.get("/adapters/{name:path}/versions")
async def list_versions(name: NameDep, engine: EngineDep) -> VersionList:
    """What is stored of the adapter's versions, released or not."""
    return VersionList(
        adapter=name,
        versions=[version_info(one, resident=resident) for one, resident in await engine.versions(name)],
    )


@router.post("/adapters/{name:path}/verify")
async def verify(name: NameDep, engine: EngineDep, version: str | None = None) -> VerifyAnswer:
    """Read a version from the store again and prove it anew; by default the one with most of the traffic."""
    version, report = await engine.verify(name, None if version is None else check_version(version))
    return VerifyAnswer(adapter=name, version=version, report=report)


@router.put("/adapters/{name:path}/pin")
async def pin(name: NameDep, engine: EngineDep) -> PinAnswer:
    """Keep what the adapter serves in memory, in every server on this store."""
    await engine.pin(name)
    return PinAnswer(adapter=name, pinned=True)


@router.delete("/adapters/{name:path}/pin")
async def unpin(name: NameDep, engine: EngineDep) -> PinAnswer:
    """Let the adapter leave memory when others need the room."""
    await engine.unpin(name)
    return PinAnswer(adapter=name, pinned=False)


@router.get("/adapters/{name:path}")
async def get_adapter(name: NameDep, engine: EngineDep) -> AdapterDetail:
    """An adapter's release, and the manifest and report of its main version."""
    described, manifest, report = await engine.describe(name)
    return adapter_detail(_summary(described), manifest, report)


@router.put("/adapters/{name:path}", status_code=201, responses={200: {"model": UploadAnswer}})
async def put_adapter(
    name: NameDep,
    form: Annotated[UploadForm, Form(media_type="multipart/form-data")],
    engine: EngineDep,
    response: Response,
    release: bool = True,
    force: bool = False,
) -> UploadAnswer:
    """Upload a checkpoint and make it serve: its files as they are, or one .zip or .tar.gz of them.

    With `release=false` it is only stored, to be tried by its version and released later. With `eval`, labelled texts
    as JSON Lines, it is released only if it does at least as well on them as what serves, or with `force=true`.
    201 where a version was stored or released, 200 where the same content was serving already.
    """
    labels = _labels(form.labels)
    async with engine.upload_turn:
        upload = Upload(
            files=[(file.filename or "", await file.read()) for file in form.files],
            labels=labels,
            eval=await form.eval.read() if form.eval is not None else None,
            release=release,
            force=force,
            note=form.note,
        )
        published = await engine.publish(name, upload, by=made_by())
    if not published.created:
        response.status_code = 200
    return upload_answer(name, published)


@router.delete("/adapters/{name:path}")
async def delete_adapter(
    name: NameDep, engine: EngineDep, note: Annotated[Note, Query()] = "", after: Annotated[After, Query()] = None
) -> DeleteAnswer:
    """Take an adapter out of service. Its versions and its history stay, and a roll-back brings it back."""
    release = await engine.delete(name, by=made_by(), note=note or "delete", after=after)
    return DeleteAnswer(adapter=name, release=release.number)


def _summary(described: Described) -> AdapterSummary:
    return adapter_summary(described.name, described.release, resident=described.resident, pinned=described.pinned)


def _labels(field: str | None) -> list[str] | None:
    if field is None:
        return None
    try:
        return TypeAdapter(Annotated[list[str], FailFast()]).validate_json(field, strict=True)
    except ValidationError as error:
        raise InvalidRequest("labels: a JSON list of strings is needed", param="labels") from error
