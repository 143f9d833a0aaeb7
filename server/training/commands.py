"""The commands `adapterd train` and `adapterd evaluate`. Heavy imports happen inside, so that `--help` is quick."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from server.client_key import ApiKey, bearer
from server.core import Pooling
from server.errors import AdapterdError, InvalidRequest
from server.training.options import TrainOptions

_FIELDS = TrainOptions.model_fields
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _option(field: str, *flags: str, envvar: str | None = None) -> Any:
    return typer.Option(*flags, help=_FIELDS[field].description, envvar=envvar)


def train_command(
    data: Annotated[Path, _option("data")],
    eval_: Annotated[Path | None, _option("eval", "--eval")] = None,
    task: Annotated[str, _option("task")] = _FIELDS["task"].default,
    method: Annotated[str, _option("method")] = _FIELDS["method"].default,
    set_: Annotated[list[str] | None, _option("config", "--set", "-s")] = None,
    head: Annotated[list[str] | None, _option("head", "--head")] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="How states become one vector: `--head pooling=`.")] = None,
    name: Annotated[str | None, _option("name")] = None,
    store: Annotated[str, _option("store", envvar="ADAPTERD_STORE")] = _FIELDS["store"].default,
    backbone: Annotated[str, _option("backbone", envvar="ADAPTERD_BACKBONE")] = _FIELDS["backbone"].default,
    device: Annotated[str, _option("device", envvar="ADAPTERD_DEVICE")] = _FIELDS["device"].default,
    dtype: Annotated[str, _option("dtype")] = _FIELDS["dtype"].default,
    epochs: Annotated[int, _option("epochs")] = _FIELDS["epochs"].default,
    learning_rate: Annotated[float, _option("learning_rate")] = _FIELDS["learning_rate"].default,
    batch_size: Annotated[int, _option("batch_size")] = _FIELDS["batch_size"].default,
    weight_decay: Annotated[float, _option("weight_decay")] = _FIELDS["weight_decay"].default,
    warmup: Annotated[float, _option("warmup")] = _FIELDS["warmup"].default,
    max_tokens: Annotated[int | None, _option("max_tokens")] = _FIELDS["max_tokens"].default,
    seed: Annotated[int, _option("seed")] = _FIELDS["seed"].default,
    as_json: _Json = False,
) -> None:
    """Train an adapter on labelled data, measure it, and publish it under --name."""
    with _reported():
        options = TrainOptions.model_validate(
            {
                "data": data,
                "eval": eval_,
                "task": task,
                "method": method,
                "config": _pairs("--set", set_),
                "head": _pairs("--head", head) | ({"pooling": pooling.value} if pooling else {}),
                "name": name,
                "store": store,
                "backbone": backbone,
                "device": device,
                "dtype": dtype,
                "epochs": epochs,
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "weight_decay": weight_decay,
                "warmup": warmup,
                "max_tokens": max_tokens,
                "seed": seed,
            }
        )
        from transformers.utils.logging import disable_progress_bar

        from server.training.trainer import train

        disable_progress_bar()
        started = time.perf_counter()
        result = train(options)
        seconds = time.perf_counter() - started
    artifact, report, release = result.artifact, result.report, result.release
    size = len(artifact.manifest_bytes) + len(artifact.tensor_bytes)
    if as_json:
        _print_json(
            version=artifact.version,
            bytes=size,
            labels=artifact.manifest.labels,
            losses=result.losses,
            seconds=seconds,
            eval=asdict(report) if report else None,
            published={"store": store, "name": name, "release": release.number} if release else None,
        )
        return
    losses = " ".join(f"{loss:.3f}" for loss in result.losses)
    print(f"trained    {task}, {method} on {data} in {seconds:.0f} s, loss {losses}")
    if report:
        print(f"measured   {report} on {report.rows} rows")
    print(f"version    {artifact.version}, {size / 1024:.0f} KiB")
    print(f"published  {name}, release {release.number}, in {store}" if release else "published  no: give it a --name")


def evaluate_command(
    adapter: Annotated[str, typer.Option(help="The adapter's name.")],
    data: Annotated[Path, typer.Option(help="Rows, JSON Lines, in the form of its task: see docs/tasks.md.")],
    url: Annotated[str, typer.Option(help="Where adapterd serves.")] = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for one answer.")] = 60.0,
    as_json: _Json = False,
) -> None:
    """Measure a served adapter on labelled data, over HTTP."""
    with _reported():
        import httpx

        from server.tasks.dataset import read_dataset
        from server.training.evaluate import evaluate, served_task

        try:
            client = httpx.Client(base_url=url, headers=bearer(api_key), timeout=timeout)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"--url {url}: {error}", param="url") from error
        with client:
            task = served_task(client, adapter)
            result = evaluate(client, adapter, task, read_dataset(data, task.example))
    report = result.report
    if as_json:
        _print_json(adapter=adapter, task=result.task, version=result.version, seconds=result.seconds, **asdict(report))
        return
    print(f"adapter    {adapter}, version {result.version}")
    print(f"measured   {report} on {report.rows} rows in {result.seconds:.1f} s")
    for label, f1 in report.f1.items():
        print(f"F1         {f1:.4f}  {label}")


def _pairs(option: str, pairs: Sequence[str] | None) -> dict[str, Any]:
    """`name=value` options; a value is JSON, or text where it is not."""
    config: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidRequest(f"{option} {pair}: write it as name=value", param=pair)
        try:
            config[name] = json.loads(value)
        except ValueError:
            config[name] = value
    return config


def _print_json(**fields: Any) -> None:
    print(json.dumps(fields, indent=1, ensure_ascii=False))


@contextmanager
def _reported() -> Iterator[None]:
    """Ends the command with one line that says what is wrong."""
    try:
        yield
    except AdapterdError as error:
        reason = error.message
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        reason = f"--{'.'.join(map(str, first['loc'])).replace('_', '-')}: {first['msg']}"
    else:
        return
    print(f"adapterd: {reason}", file=sys.stderr)
    raise typer.Exit(1)
