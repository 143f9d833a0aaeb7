"""The trainer: fits an adapter's tensors over the frozen backbone.

At every step the tensors are bound and applied by the same code that serves them, so what is trained is what is served.
"""

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from server import __version__
from server.adapters import METHODS
from server.adapters.plan import AdapterPlan, Segment
from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import BackboneSpec, Encoding, TextInput, WindowPooling
from server.errors import Conflict, InvalidRequest, TooLarge
from server.store.artifact import Artifact, Golden, Manifest, TrainedOn, Training
from server.store.names import check_name
from server.store.releases import Plan, Release
from server.store.store import AdapterStore
from server.tasks.adapter import Blueprint, TaskAdapter, task_named
from server.tasks.base import Outputs, Window
from server.tasks.dataset import Dataset, read_dataset
from server.tasks.metrics import Report
from server.training.options import TrainOptions

HYPERPARAMETERS = {"dtype", "epochs", "learning_rate", "batch_size", "weight_decay", "warmup", "max_tokens", "seed"}
"""The options that a manifest records beside the method's and the head's. Paths stay out: they tell of the machine."""

CLIP_NORM = 1.0
"""Longest gradient of a step: one odd batch must not undo the others."""

GOLDEN_TEXTS = (
    "It works, and I would buy it again.",
    "Nothing arrived; please send the money back.",
    "Tomorrow at nine the meeting starts, heute um neun beginnt die Sitzung.",
    "FREE!!! 100% guaranteed, click http://example.com now.",
)
"""Made up rather than taken from the data: a manifest travels farther than training texts, which can be personal."""

RELEASE_TRIES = 5
"""Each try takes the number after the latest release, so only a steady stream of other writers wins them all."""

PREDICT_TEXTS = 32
"""Texts of one forward when measuring: more gain nothing on a CPU and take memory."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of a training."""

    artifact: Artifact
    losses: list[float]
    """Mean loss of each epoch."""
    report: Report | None
    """Measured on the eval file, where one was given."""
    release: Release | None
    """The release that serves the adapter from here on, where it was published."""


def train(options: TrainOptions) -> TrainResult:
    """Trains an adapter, measures it and, where `options.name` is given, publishes it.

    The same options and data give the same artifact on the same machine. Raises InvalidRequest for data or options
    that make no sense, InvalidAdapter for a task that is not known and a method or a head that does not fit the
    backbone, BackboneError, StoreUnavailable.
    """
    # before the hours of training, not after them
    store = AdapterStore.open(options.store) if options.name and check_name(options.name) else None
    task = task_named(options.task)
    data = read_dataset(options.data, task.example)
    labels = task.labels(data.examples)
    test = read_dataset(options.eval, task.example, known=labels) if options.eval else None
    backbone = Backbone.load(options.backbone, device=options.device, dtype=options.dtype)
    blueprint = Blueprint.check(
        method=options.method,
        config=_config(options, backbone.spec),
        task=options.task,
        head=options.head,
        labels=labels,
        spec=backbone.spec,
    )
    windows = _windows(backbone.tokenizer, blueprint, test, str(options.eval)) if test else []
    tensors, losses = fit(backbone, blueprint, data, options)

    # Whatever it was trained in, its outputs are recorded as precisely as can be.
    if backbone.dtype != torch.float32:
        backbone = Backbone.load(options.backbone, device=options.device, dtype="float32")
    adapter = blueprint.bind(tensors, backbone)
    measured = measure(backbone, adapter, test, windows) if test else None
    artifact = Artifact.build(_manifest(options, data, blueprint, measured, _golden(backbone, adapter)), tensors)

    release = None
    if store and options.name:
        release = asyncio.run(_publish(store, options.name, artifact, _note(options, measured)))
    return TrainResult(artifact, losses, measured, release)


async def _publish(store: AdapterStore, name: str, artifact: Artifact, note: str) -> Release:
    """Releases what training took hours to make, also where others release under the same name meanwhile."""
    plan = Plan.only(await store.put_version(name, artifact))
    for _ in range(RELEASE_TRIES - 1):
        with suppress(Conflict):
            return await store.release(name, plan, by="adapterd train", note=note)
    return await store.release(name, plan, by="adapterd train", note=note)


def outputs(backbone: Backbone, adapter: TaskAdapter, texts: Sequence[Encoding]) -> Outputs:
    """Raw outputs of one adapter for texts in one batch, one entry each. Differentiable."""
    states = backbone.forward(texts, AdapterPlan([Segment(adapter.weights, 0, len(texts))]))
    return adapter.task.apply(adapter.head, states, 0, len(texts))


def measure(
    backbone: Backbone, adapter: TaskAdapter, data: Dataset[Any], windows: Sequence[Sequence[Encoding]]
) -> Report:
    """Measures an adapter without a server. `windows` are those of each input in the data."""
    answers = iter(_fetched(backbone, adapter, [encoding for own in windows for encoding in own]))
    predictions = [
        adapter.read(text, [Window(one, next(answers)) for one in own], adapter.task.measured, WindowPooling.MEAN)
        for text, own in zip(_inputs(data.examples), windows, strict=True)
    ]
    return adapter.task.measure(data.examples, predictions)


def fit(
    backbone: Backbone, blueprint: Blueprint, data: Dataset[Any], options: TrainOptions
) -> tuple[dict[str, Tensor], list[float]]:
    """Trains: the tensors, float32 on the CPU, and the mean loss of each epoch. The backbone stays as it is."""
    task = blueprint.task
    examples, restore = task.standardized(data.examples, blueprint.head)
    # All randomness comes from here: which tensors to start from and which rows share a step.
    generator = torch.Generator().manual_seed(options.seed)
    fresh = blueprint.init(backbone, generator)
    if not fresh:
        raise InvalidRequest(f"{options.method} has nothing to train for {task.name}", param="method")
    tensors = {name: tensor.to(backbone.device).requires_grad_() for name, tensor in fresh.items()}
    encoded = iter(_encoded(_tokenizer(options, backbone), blueprint, examples, str(options.data)))
    texts = [[next(encoded) for _ in example.inputs()] for example in examples]
    optimizer = torch.optim.AdamW(tensors.values(), lr=options.learning_rate, weight_decay=options.weight_decay)
    steps = options.epochs * -(-len(examples) // options.batch_size)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(options.warmup * steps), steps)
    losses: list[float] = []
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for epoch in range(options.epochs):
            total = 0.0
            for batch in torch.split(torch.randperm(len(examples), generator=generator), options.batch_size):
                # anew at each step, since binding prepares copies of the tensors that the last step has changed
                adapter = blueprint.bind(tensors, backbone)
                rows = [examples[i] for i in batch.tolist()]
                encodings = [encoding for i in batch.tolist() for encoding in texts[i]]
                targets = task.targets(rows, encodings, blueprint.labels).to(backbone.device)
                loss = task.loss(outputs(backbone, adapter, encodings), targets)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                clip_grad_norm_(tensors.values(), CLIP_NORM)
                optimizer.step()
                scheduler.step()
                value = loss.item()
                total += value * len(batch)
                bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", refresh=False)
                bar.update()
            if not math.isfinite(total):
                raise InvalidRequest(
                    f"the loss became {total} in epoch {epoch + 1}; try a lower learning rate than "
                    f"{options.learning_rate}",
                    param="learning_rate",
                )
            losses.append(total / len(examples))
    return restore({name: tensor.detach().cpu() for name, tensor in tensors.items()}), losses


def _inputs(examples: Sequence[Any]) -> list[TextInput]:
    return [text for example in examples for text in example.inputs()]


def _encoded(tokenizer: Tokenizer, blueprint: Blueprint, examples: Sequence[Any], source: str) -> list[Encoding]:
    """The inputs of all examples, cut to what the adapter leaves of the backbone's length."""
    with _named(source):
        return tokenizer.encode(
            _inputs(examples),
            truncate=True,
            reserved=blueprint.framing.positions,
            aligned=blueprint.task.aligned,
        )


def _windows(tokenizer: Tokenizer, blueprint: Blueprint, data: Dataset[Any], source: str) -> list[list[Encoding]]:
    """Each input in windows, or cut, as a server would do it."""
    if not blueprint.task.windowed:
        return [[one] for one in _encoded(tokenizer, blueprint, data.examples, source)]
    with _named(source):
        return tokenizer.windows(_inputs(data.examples), reserved=blueprint.framing.positions)


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Inputs that cannot be encoded are reported with the file that they are in."""
    try:
        yield
    except (InvalidRequest, TooLarge) as error:
        raise InvalidRequest(f"{source}: {error.param}: {error.message}", param=source) from error


def _fetched(backbone: Backbone, adapter: TaskAdapter, texts: Sequence[Encoding]) -> list[Tensor]:
    """Raw outputs, one entry per text, float32 on the CPU."""
    with torch.inference_mode():
        return [
            output.float().cpu()
            for start in range(0, len(texts), PREDICT_TEXTS)
            for output in outputs(backbone, adapter, texts[start : start + PREDICT_TEXTS])
        ]


def _config(options: TrainOptions, spec: BackboneSpec) -> dict[str, Any]:
    """The method's options, with what it takes from the backbone."""
    method = METHODS.get(options.method)
    return method.complete(options.config, spec) if method else options.config


def _tokenizer(options: TrainOptions, backbone: Backbone) -> Tokenizer:
    """The backbone's, or one like it that cuts texts shorter."""
    if options.max_tokens is None:
        return backbone.tokenizer
    return Tokenizer.load(resolve(options.backbone), min(options.max_tokens, backbone.spec.max_tokens))


def _golden(backbone: Backbone, adapter: TaskAdapter) -> Golden:
    """Outputs of a few texts, to the sixth decimal: float32 is not sure of more."""
    inputs = [adapter.task.sample(text) for text in GOLDEN_TEXTS]
    room = adapter.weights.framing.positions
    rows = _fetched(backbone, adapter, backbone.tokenizer.encode(inputs, truncate=True, reserved=room))
    recorded = tuple(tuple(round(value, 6) for value in row.flatten().tolist()) for row in rows)
    return Golden(texts=GOLDEN_TEXTS, outputs=recorded)


def _manifest(
    options: TrainOptions, data: Dataset[Any], blueprint: Blueprint, measured: Report | None, golden: Golden
) -> Manifest:
    spec = blueprint.spec
    return Manifest(
        method=options.method,
        config=blueprint.config.model_dump(mode="json"),
        task=options.task,
        head=blueprint.head.model_dump(mode="json"),
        labels=blueprint.labels,
        backbone=TrainedOn.on(spec),
        source=f"adapterd {__version__}",
        training=Training(
            data_sha256=data.sha256,
            rows=len(data.examples),
            hyperparameters=options.model_dump(mode="json", include=HYPERPARAMETERS),
            metrics=dict(measured.metrics) if measured else {},
        ),
        golden=golden,
    )


def _note(options: TrainOptions, measured: Report | None) -> str:
    made = f"{options.method}, trained on {options.data.name}"
    return f"{made}; {measured} on {measured.rows} rows" if measured else made
