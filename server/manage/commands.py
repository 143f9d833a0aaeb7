"""The commands `adapterd adapters ...`. Heavy imports happen inside, so that `--help` is quick."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from server.client_key import ApiKey, bearer
from server.errors import AdapterdError

if TYPE_CHECKING:
    from server.api.schemas import AdapterList
    from server.manage.manager import Manager
    from server.settings import Settings

URL_VARIABLE = "ADAPTERD_URL"
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 300.0
"""A server proves an upload before it answers."""

HISTORY = 10
"""Releases that `show` shows."""

KEEP_WORDS = "10"
MIN_AGE_WORDS = "3600"
"""Defaults of gc.py, as `--help` tells them without loading it."""

app = typer.Typer(
    no_args_is_help=True,
    help="Look after adapters: on a running server (--url), or straight on a store (--store).",
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
_Url = Annotated[
    str | None,
    typer.Option(help=f"A running server; else {URL_VARIABLE} names it.", show_default=DEFAULT_URL),
]
_Store = Annotated[
    str | None,
    typer.Option(help="Instead of a server: a folder, file:///folder, s3://..., gs://... or az://..."),
]
_Endpoint = Annotated[str | None, typer.Option(help="The server behind an s3:// or az:// store, if not the cloud's.")]
_Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that a server may take to answer.")]
_Backbone = Annotated[
    str | None, typer.Option(help="With --store: the backbone to prove on; else ADAPTERD_BACKBONE names it.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, as HTTP gives it.")]
_Wide = Annotated[bool, typer.Option("--wide", help="All digits of versions.")]
_Note = Annotated[str, typer.Option(help="Why; it is kept in the history.")]
_After = Annotated[int | None, typer.Option(min=0, help="Only if this is still the last release (0: none yet).")]


@app.command("list")
def list_command(
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    wide: _Wide = False,
    as_json: _Json = False,
) -> None:
    """The adapters that serve."""
    with _reported(), _manager(url, api_key, store, store_endpoint, timeout) as manager:
        listed = manager.adapters()
        if as_json:
            _print_json(_plain([listed])[0])
        else:
            from server.manage.tables import Tables

            Tables(wide=wide).adapters(listed.adapters)
            for name in listed.damaged:
                _complain(f"the last release of {name} cannot be read")


@app.command("show")
def show_command(
    name: _Name,
    releases: Annotated[int, typer.Option(min=1, max=1000, help="How many of the last releases.")] = HISTORY,
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    wide: _Wide = False,
    as_json: _Json = False,
) -> None:
    """One adapter, its versions and its last releases."""
    with _reported(), _manager(url, api_key, store, store_endpoint, timeout) as manager:
        from server.manage.manager import overview

        known = overview(manager, name, releases)
        if as_json:
            _print_json(
                {
                    "adapter": None if known.adapter is None else _plain([known.adapter])[0],
                    "versions": _plain(known.versions),
                    "releases": _plain(known.releases),
                }
            )
        else:
            from server.manage.tables import Tables

            Tables(wide=wide).overview(name, known)


@app.command("push")
def push_command(
    name: _Name,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="The folder of a checkpoint, its files, or an archive.")
    ],
    labels: Annotated[str | None, typer.Option(help="Names of the labels, in order: a,b,c.")] = None,
    labels_file: Annotated[Path | None, typer.Option(help="A JSON list of them.")] = None,
    eval_: Annotated[
        Path | None,
        typer.Option("--eval", help="Labelled texts, JSON Lines: release it only if it does as well as what serves."),
    ] = None,
    no_release: Annotated[bool, typer.Option("--no-release", help="Only store it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Release it however it does on --eval.")] = False,
    note: _Note = "",
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    backbone: _Backbone = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    wide: _Wide = False,
    as_json: _Json = False,
) -> None:
    """Upload a checkpoint: it is proven, stored and released."""
    with _reported():
        from server.manage.manager import Push

        push = Push(
            files=_files(paths),
            labels=_labels(labels, labels_file),
            eval=None if eval_ is None else _file(eval_),
            release=not no_release,
            force=force,
            note=_checked(note),
        )
        with _manager(url, api_key, store, store_endpoint, timeout, backbone=backbone, make=True) as manager:
            answer = manager.push(name, push)
        _show(answer, wide=wide, as_json=as_json)


@app.command("release")
def release_command(
    name: _Name,
    versions: Annotated[
        list[str],
        typer.Argument(metavar="VERSION[=SHARE]...", help="One version, or several with shares that add up to 1."),
    ],
    shadow: Annotated[
        list[str] | None, typer.Option(help="A version that computes every request as well; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --store: also what no server has proven.")] = False,
    note: _Note = "",
    after: _After = None,
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    wide: _Wide = False,
    as_json: _Json = False,
) -> None:
    """Say which stored versions serve from here on, and with which shares of the requests."""
    with _reported():
        shares = [_share(version, alone=len(versions) == 1) for version in versions]
        with _manager(url, api_key, store, store_endpoint, timeout) as manager:
            from server.api.schemas import ReleaseBody
            from server.manage.manager import WrongUse, whole_version

            traffic: dict[str, float] = {}
            for prefix, share in shares:
                version = whole_version(manager, name, prefix)
                if version in traffic:
                    raise WrongUse(f"version {prefix} is there twice")
                traffic[version] = share
            shadows = [whole_version(manager, name, prefix) for prefix in shadow or ()]
            body = ReleaseBody.model_validate({"traffic": traffic, "shadow": shadows, "note": note, "after": after})
            answer = manager.release(name, body, force=force)
        _show(answer, wide=wide, as_json=as_json)


@app.command("rollback")
def rollback_command(
    name: _Name,
    to: Annotated[int | None, typer.Option(min=1, help="A release; else what served before this one.")] = None,
    note: _Note = "",
    after: _After = None,
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    wide: _Wide = False,
    as_json: _Json = False,
) -> None:
    """Serve again what served before."""
    with _reported(), _manager(url, api_key, store, store_endpoint, timeout) as manager:
        from server.api.schemas import RollbackBody

        answer = manager.rollback(name, RollbackBody(to=to, note=note, after=after))
        _show(answer, wide=wide, as_json=as_json)


@app.command("pin")
def pin_command(
    name: _Name,
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    as_json: _Json = False,
) -> None:
    """Keep what the adapter serves in memory, in every server on its store."""
    with _reported(), _manager(url, api_key, store, store_endpoint, timeout) as manager:
        _show(manager.pin(name), as_json=as_json)


@app.command("unpin")
def unpin_command(
    name: _Name,
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    as_json: _Json = False,
) -> None:
    """Let the adapter leave memory when others need the room."""
    with _reported(), _manager(url, api_key, store, store_endpoint, timeout) as manager:
        _show(manager.unpin(name), as_json=as_json)


@app.command("delete")
def delete_command(
    name: _Name,
    note: _Note = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    as_json: _Json = False,
) -> None:
    """Take an adapter out of service. Its versions and its history stay, and a rollback brings it back."""
    with _reported():
        if not yes:
            _confirm(f"Take {name} out of service?")
        with _manager(url, api_key, store, store_endpoint, timeout) as manager:
            _show(manager.delete(name, _checked(note)), as_json=as_json)


@app.command("gc")
def gc_command(
    adapter: Annotated[str | None, typer.Option(help="Only this one's versions; else everybody's.")] = None,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Versions that the last so many releases name stay.", show_default=KEEP_WORDS),
    ] = None,
    min_age: Annotated[
        float | None,
        typer.Option(min=0, help="Versions younger than so many seconds stay.", show_default=MIN_AGE_WORDS),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    wide: _Wide = False,
    as_json: _Json = False,
) -> None:
    """Remove versions that no recent release names."""
    with _reported(), _manager(url, api_key, store, store_endpoint, timeout) as manager:
        from server.api.schemas import CollectBody

        given = {"adapter": adapter, "keep": keep, "min_age_seconds": min_age, "dry_run": dry_run}
        body = CollectBody.model_validate({field: value for field, value in given.items() if value is not None})
        _show(manager.collect(body), wide=wide, as_json=as_json)


@app.command("verify")
def verify_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One adapter; else all.")] = None,
    version: Annotated[str | None, typer.Option(help="Only this version.")] = None,
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="All that are stored, not only what the last release names.")
    ] = False,
    prove: Annotated[
        bool, typer.Option("--prove", help="With --store: run them over the backbone too, as a server does.")
    ] = False,
    url: _Url = None,
    api_key: ApiKey = None,
    store: _Store = None,
    store_endpoint: _Endpoint = None,
    backbone: _Backbone = None,
    timeout: _Timeout = TIMEOUT_SECONDS,
    wide: _Wide = False,
    as_json: _Json = False,
) -> None:
    """Read stored versions again and check them. The exit status is 1 if something is wrong with one."""
    with _reported(), _manager(url, api_key, store, store_endpoint, timeout, backbone=backbone, prove=prove) as manager:
        from server.manage.manager import WrongUse, verify, verify_one, whole_version
        from server.manage.tables import Tables

        if version is None:
            names = _names(manager.adapters()) if name is None else [name]
            results = list(verify(manager, names, all_versions=all_versions))
        elif name is None or all_versions:
            raise WrongUse("--version goes with the NAME of an adapter, and without --all-versions")
        else:
            results = [verify_one(manager, name, whole_version(manager, name, version))]
        if as_json:
            _print_json(_plain(results))
        else:
            Tables(wide=wide).checked(results)
        bad = [one for one in results if one.error is not None]
        for one in bad:
            _complain(f"{one.adapter}{f', version {one.version}' if one.version else ''}: {one.error}")
        if bad:
            raise typer.Exit(1)


@contextmanager
def _manager(
    url: str | None,
    api_key: str | None,
    store: str | None,
    endpoint: str | None,
    timeout: float,
    *,
    backbone: str | None = None,
    make: bool = False,
    prove: bool = False,
) -> "Iterator[Manager]":
    from server.manage.manager import WrongUse

    if url is not None and store is not None:
        raise WrongUse("give --url or --store, not both")
    if store is None:
        for option, value in (("--store-endpoint", endpoint), ("--backbone", backbone)):
            if value is not None:
                raise WrongUse(f"{option} goes with --store")
        from server.manage.remote import Remote
        from server.manage.tables import watch_upload

        address = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        manager: Manager = Remote(address, timeout_seconds=timeout, watch_upload=watch_upload, headers=bearer(api_key))
    else:
        from server.manage.local import Local, Proving

        settings = _settings(store=store, store_endpoint=endpoint, backbone=backbone)
        manager = Proving(settings) if prove else Local(settings, make=make)
    with closing(manager):
        yield manager


def _settings(**options: str | None) -> "Settings":
    """A server's settings, of the environment and of these options."""
    from server.manage.manager import WrongUse
    from server.settings import Settings

    given: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise WrongUse(f"ADAPTERD_{str(first['loc'][0]).upper()}: {first['msg']}") from error


@contextmanager
def _reported() -> Iterator[None]:
    """Ends the command with one line that says what is wrong: status 2 where it is the command line, else 1."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        reason, status = f"{field}: {reason}" if field else reason, 2
    except AdapterdError as error:
        from server.manage.manager import WrongUse

        reason, status = error.message, 2 if isinstance(error, WrongUse) else 1
    except OSError as error:
        if error.filename is None:  # no file of the user's: a closed pipe, say
            raise
        reason, status = f"{error.filename} cannot be read: {error.strerror}", 1
    else:
        return
    _complain(reason)
    raise typer.Exit(status) from None


def _names(listed: "AdapterList") -> list[str]:
    """All that may have something to verify."""
    return sorted([*(one.name for one in listed.adapters), *listed.damaged])


def _complain(reason: str) -> None:
    from server.manage.tables import printable

    print(f"adapterd: {printable(reason)}", file=sys.stderr)


def _show(answer: BaseModel, *, as_json: bool, wide: bool = False) -> None:
    if as_json:
        _print_json(_plain([answer])[0])
        return
    from server.manage.tables import Tables

    Tables(wide=wide).answer(answer)


def _plain(answers: Sequence[BaseModel]) -> list[Any]:
    return [answer.model_dump(mode="json") for answer in answers]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _confirm(question: str) -> None:
    from server.manage.manager import WrongUse

    if not _asked_on_a_terminal():
        raise WrongUse("nobody can be asked here: give --yes")
    typer.confirm(question, abort=True, err=True)


def _checked(note: str) -> str:
    """For what has no body that would check it."""
    from server.api.schemas import RollbackBody

    return RollbackBody(note=note).note


def _asked_on_a_terminal() -> bool:
    return sys.stdin.isatty()


def _files(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """What is to be uploaded, under which names: files, and those of folders."""
    from server.manage.manager import WrongUse
    from server.store.folder import checkpoint_files

    found: list[tuple[str, Path]] = []
    for path in paths:
        if not path.is_dir():
            found.append((path.name, _file(path)))
            continue
        inside = sorted((name, file) for name, file in checkpoint_files(path) if file.is_file())
        if not inside:
            raise WrongUse(f"folder {path} has no files")
        found += inside
    return found


def _file(path: Path) -> Path:
    from server.manage.manager import WrongUse

    if not path.is_file():
        raise WrongUse(f"there is no file {path}")
    return path


def _labels(listed: str | None, file: Path | None) -> list[str] | None:
    from pydantic import TypeAdapter

    from server.manage.manager import WrongUse

    if listed is not None and file is not None:
        raise WrongUse("give --labels or --labels-file, not both")
    if listed is not None:
        return [label.strip() for label in listed.split(",")]
    if file is None:
        return None
    try:
        return TypeAdapter(list[str]).validate_json(_file(file).read_bytes(), strict=True)
    except ValidationError:
        raise WrongUse(f"{file} is not a JSON list of strings") from None


def _share(argument: str, *, alone: bool) -> tuple[str, float]:
    """A version and its share of the requests, of VERSION=SHARE."""
    from server.manage.manager import WrongUse

    version, equals, share = argument.partition("=")
    if not equals and alone:
        return version, 1.0
    try:
        return version, float(share)
    except ValueError:
        raise WrongUse(f"{argument!r}: several versions need shares, written like {version}=0.1") from None
