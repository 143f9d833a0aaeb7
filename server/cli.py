"""The command `adapterd`. Heavy imports happen inside the commands, so that --help answers at once."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.client_key import KEY_VARIABLE
from server.manage.commands import URL_VARIABLE
from server.manage.commands import app as adapters_app
from server.training.commands import evaluate_command, train_command

if TYPE_CHECKING:
    from server.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One frozen transformer backbone, thousands of hot-swappable adapters.",
)
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.add_typer(adapters_app, name="adapters")


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint with .bin files.")],
    target: Annotated[Path, typer.Argument(help="Folder to write it to, new or empty.")],
) -> None:
    """Make a checkpoint's pickled .bin files safetensors, as the server wants them."""
    from server.convert import convert
    from server.errors import AdapterdError

    try:
        written = convert(source, target)
    except AdapterdError as error:
        print(f"adapterd: {error.message}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"converted  {source} to {target}: {', '.join(written)}")


@app.command("key")
def key_command(
    name: Annotated[str, typer.Argument(help="Whose key it is; logs show it.")],
    scope: Annotated[list[str] | None, typer.Option(help="infer, admin or metrics; several times for several.")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option(help="Names that it reaches, like 'team-a-*'; several times for several.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="How often it may ask; as often as it likes.")] = None,
    file: Annotated[Path | None, typer.Option(help="Add it to this file, ADAPTERD_API_KEYS_FILE.")] = None,
) -> None:
    """Make an API key. The secret is printed once, and kept nowhere: the server knows its digest only."""
    from pydantic import ValidationError

    from server.api.access.keys import KeyEntry, Keys, digest_of, new_key
    from server.errors import AdapterdError

    secret = new_key()
    given = {"scopes": scope, "adapters": adapters, "requests_per_minute": requests_per_minute}
    given = {option: value for option, value in given.items() if value is not None}
    try:
        entry = KeyEntry.model_validate({"name": name, "sha256": digest_of(secret), **given})
        if file is not None:
            Keys.add(file, entry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        print(f"adapterd: {'.'.join(map(str, first['loc']))}: {first['msg']}", file=sys.stderr)
        raise typer.Exit(2) from None
    except AdapterdError as error:
        print(f"adapterd: {error.message}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(secret)
    if file is None:
        print(entry.model_dump_json(exclude_none=True))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A folder, a hub id or a package's backbone.")] = None,
    store: Annotated[str | None, typer.Option(help="A folder, file:///... or memory://.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="The keys that it takes: see adapterd key.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen on any address though nobody is asked for a key.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate chain, PEM: speak HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    ssl_ca_certs: Annotated[Path | None, typer.Option(help="PEM; ask clients for a certificate of these.")] = None,
) -> None:
    """Serve adapters over HTTP. Every other option is an environment variable: see docs/settings.md."""
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "backbone": backbone,
        "store": store,
        "device": device,
        "dtype": dtype,
        "api_keys_file": None if api_keys_file is None else str(api_keys_file),
        "insecure": insecure,
        "ssl_certfile": None if ssl_certfile is None else str(ssl_certfile),
        "ssl_keyfile": None if ssl_keyfile is None else str(ssl_keyfile),
        "ssl_ca_certs": None if ssl_ca_certs is None else str(ssl_ca_certs),
    }
    settings = _settings({name: value for name, value in flags.items() if value is not None})
    from server import serving

    raise typer.Exit(serving.run(settings))


@app.command("healthcheck")
def healthcheck_command() -> None:
    """Ask the server that runs here, with the settings of this environment, whether it is ready. Status 0: it is."""
    from server.healthcheck import trouble

    if reason := trouble(_settings({})):
        print(f"adapterd: {reason}", file=sys.stderr)
        raise typer.Exit(1)


def _settings(flags: dict[str, Any]) -> "Settings":
    """Those of the environment and of the flags. Ends the command where they make no sense."""
    from pydantic import ValidationError

    from server.settings import Settings

    try:
        settings = Settings(**flags)
    except ValidationError as error:
        for wrong in error.errors():
            field = ".".join(map(str, wrong["loc"]))
            where = f"{field} (ADAPTERD_{field.upper()}): " if field else ""
            print(f"adapterd: {where}{wrong['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        raise typer.Exit(2) from None
    known = {URL_VARIABLE, KEY_VARIABLE, *(f"ADAPTERD_{field.upper()}" for field in Settings.model_fields)}
    if unknown := sorted(name for name in os.environ if name.startswith("ADAPTERD_") and name not in known):
        print(f"adapterd: {unknown[0]} is not a setting; see docs/settings.md", file=sys.stderr)
        raise typer.Exit(2)
    return settings


def main() -> None:
    """Entry point of the console script."""
    app()
