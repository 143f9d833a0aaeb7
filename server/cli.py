"""The command `adapterd`. Heavy imports happen inside the commands, so that --help answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from server.manage.commands import URL_VARIABLE
from server.manage.commands import app as adapters_app
from server.training.commands import evaluate_command, train_command

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


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A folder, a hub id or a package's backbone.")] = None,
    store: Annotated[str | None, typer.Option(help="A folder, file:///... or memory://.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
) -> None:
    """Serve adapters over HTTP. Every other option is an environment variable: see docs/settings.md."""
    from pydantic import ValidationError

    from server.settings import Settings

    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "backbone": backbone,
        "store": store,
        "device": device,
        "dtype": dtype,
    }
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        for wrong in error.errors():
            field = ".".join(map(str, wrong["loc"]))
            print(f"adapterd: {field} (ADAPTERD_{field.upper()}): {wrong['msg']}", file=sys.stderr)
        raise typer.Exit(2) from None
    known = {URL_VARIABLE, *(f"ADAPTERD_{field.upper()}" for field in Settings.model_fields)}
    if unknown := sorted(name for name in os.environ if name.startswith("ADAPTERD_") and name not in known):
        print(f"adapterd: {unknown[0]} is not a setting; see docs/settings.md", file=sys.stderr)
        raise typer.Exit(2)
    from server import serving

    raise typer.Exit(serving.run(settings))


def main() -> None:
    """Entry point of the console script."""
    app()
