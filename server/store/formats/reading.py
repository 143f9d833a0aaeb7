"""What all readers of foreign checkpoints need: JSON files, label names, and tensors that are used up one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from torch import Tensor

from server.adapters import METHODS
from server.adapters.base import Host, check_tensors
from server.core import BackboneSpec
from server.errors import InvalidAdapter
from server.store.artifact import Artifact, Labels, Manifest, MorePart, TrainedOn, invalid_fields
from server.store.formats.files import required_json
from server.tasks.adapter import Blueprint

MODEL_CONFIG = "config.json"
"""The whole model's config, which names the labels, if the uploader adds it."""

LABELS = "labels.json"
"""A side file with the label names, a JSON list, for checkpoints that do not name them."""

INERT_CONFIG = frozenset(
    {
        "_name_or_path",
        "chunk_size_feed_forward",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "initializer_cutoff_factor",
        "initializer_range",
        "is_decoder",
        "num_labels",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of config.json that change no output of a classifier, beside dropouts, ids of special tokens and the like."""

PROBLEM_TASKS = {
    None: "classification",
    "single_label_classification": "classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}
"""transformers' `problem_type` -> our task."""


@dataclass
class Checkpoint:
    """The tensors of a foreign checkpoint on their way to the neutral artifact.

    Readers `take` each tensor that they know, under the name that it has in the file. What nobody takes is refused.
    """

    tensors: Mapping[str, Tensor]
    host: Host
    ours: dict[str, Tensor] = field(default_factory=dict)
    """Artifact tensor name -> tensor."""
    _sources: dict[str, str] = field(default_factory=dict)  # artifact tensor name -> name in the file
    _taken: set[str] = field(default_factory=set)

    def take(
        self,
        theirs: str,
        ours: str,
        shape: tuple[int, ...] | None = None,
        fit: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """A tensor of the file becomes one of the artifact. `shape` is the one it has to have in the file, if another.

        `fit` brings it from that shape into the artifact's. A tensor that is not there is missed in the end.
        """
        if self._sources.setdefault(ours, theirs) != theirs:
            raise InvalidAdapter(
                f"tensors {self._sources[ours]!r} and {theirs!r} stand for the same", param=theirs, code="contradiction"
            )
        if theirs not in self.tensors:
            return
        tensor = self.use(theirs, shape)
        self.ours[ours] = tensor if fit is None else fit(tensor)

    def use(self, theirs: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor of the file that the reader makes something of. InvalidAdapter if it is missing or misshapen."""
        wanted = {} if shape is None else {theirs: shape}
        if theirs not in self.tensors:
            raise InvalidAdapter(f"tensor {theirs!r} is missing", param=theirs, code="missing_tensor")
        tensor = self.tensors[theirs]
        check_tensors({theirs: tensor}, wanted or {theirs: tuple(tensor.shape)})
        self._taken.add(theirs)
        return tensor

    def put(self, ours: str, tensor: Tensor) -> None:
        """A tensor that a reader has made."""
        self.ours[ours] = tensor

    def skip(self, theirs: str) -> None:
        """A tensor of the file that changes nothing."""
        self._taken.add(theirs)

    def same(self, theirs: str, other: str) -> None:
        """A tensor that is in the file twice. InvalidAdapter if the two differ."""
        self.use(theirs)
        self.use(other)
        if not torch.equal(self.tensors[theirs].float(), self.tensors[other].float()):
            raise InvalidAdapter(
                f"tensors {theirs!r} and {other!r} have to be the same, and are not", param=theirs, code="contradiction"
            )

    def is_frozen(self, theirs: str, name: str) -> bool:
        """Whether a tensor of the file is the backbone's own of that name, in the precision that serves."""
        frozen = self.host.tensors().get(name)
        tensor = self.tensors[theirs]
        if frozen is None or frozen.shape != tensor.shape:
            return False
        return torch.equal(tensor.to(frozen.device, frozen.dtype), frozen)

    def is_left(self, theirs: str | None) -> bool:
        """Whether a tensor is there and nobody has taken it."""
        return theirs in self.tensors and theirs not in self._taken

    @property
    def left(self) -> list[str]:
        """Names of tensors that nobody has taken."""
        return sorted(self.tensors.keys() - self._taken)

    def finish(
        self,
        *,
        parts: Sequence[tuple[str, Mapping[str, Any]]],
        task: str,
        head: Mapping[str, Any],
        labels: tuple[str, ...],
        source: str,
    ) -> Artifact:
        """The artifact. Refuses a misshapen, an unused or a missing tensor by the name that it has in the file.

        One that is missing, and whose name there the reader does not know, is called by ours.
        """
        spec = self.host.spec
        if not parts:
            raise InvalidAdapter("the checkpoint holds no adapter", param="files", code="missing_tensor")
        (method, config), *also = parts
        blueprint = Blueprint.check(
            method=method, config=config, also=also, task=task, head=head, labels=labels, spec=spec
        )
        named = {self._sources.get(name, name): tensor for name, tensor in self.ours.items()}
        wanted = {self._sources.get(name, name): shape for name, shape in blueprint.shapes().items()}
        check_tensors(named | {name: self.tensors[name] for name in self.left}, wanted)
        (first, options), *more = [(part.method.name, part.config.model_dump(mode="json")) for part in blueprint.parts]
        manifest = Manifest(
            method=first,
            config=options,
            also=tuple(MorePart(method=name, config=own) for name, own in more),
            task=task,
            head=dict(head),
            labels=labels,
            # A library names its base by a path at best; the backbone that this upload is proven on is what it is
            # bound to.
            backbone=TrainedOn.on(spec),
            source=source,
        )
        return Artifact.build(manifest, self.ours)


def configured(where: str, method: str, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
    """A method's options, completed and checked. Raises InvalidAdapter naming the option."""
    kind = METHODS[method]
    try:
        config = kind.Config.model_validate(kind.complete(options, spec))
    except ValidationError as error:
        raise invalid_fields(where, error) from error
    kind.sites(config, spec)
    return config.model_dump(mode="json")


def refusal(where: str, options: Mapping[str, Any], option: str, supported: str) -> InvalidAdapter:
    """The refusal of an option by its name."""
    value = repr(options.get(option))
    return InvalidAdapter(
        f"{where}: {option or repr(option)} = {value if len(value) <= 200 else value[:200] + '...'} is not supported; "
        f"supported: {supported}",
        param=option or where,
        code="unsupported_option",
    )


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A JSON object in a file that has to be there."""
    document = _parsed(files, name)
    if not isinstance(document, dict):
        raise InvalidAdapter(f"{name} is not a JSON object", param=name, code="bad_file")
    return document


def read_json_list(files: Mapping[str, bytes], name: str) -> list[Any]:
    """A JSON list in a file that has to be there."""
    document = _parsed(files, name)
    if not isinstance(document, list):
        raise InvalidAdapter(f"{name} is not a JSON list", param=name, code="bad_file")
    return document


def _parsed(files: Mapping[str, bytes], name: str) -> Any:
    try:
        return from_json(required_json(files, name))
    except ValueError as error:
        raise InvalidAdapter(f"{name} is not JSON: {error}", param=name, code="bad_file") from error


def refuse_pickle(files: Mapping[str, bytes], file: str, pickle: str, flag: str = "") -> None:
    """Refuses a checkpoint whose tensors are pickled; `flag` makes its library save them as `file`."""
    if file not in files and pickle in files:
        raise InvalidAdapter(
            f"{pickle} is a pickle, which this server does not open; make it {file} with `adapterd convert "
            "SOURCE_FOLDER TARGET_FOLDER`" + (f", or save the adapter with {flag}" if flag else ""),
            param=pickle,
            code="bad_file",
        )


def model_config(files: Mapping[str, bytes], host: Host) -> dict[str, Any]:
    """The whole model's config.json, if it is there. It has to say what the backbone's own says."""
    model = read_json(files, MODEL_CONFIG) if MODEL_CONFIG in files else {}
    check_backbone(MODEL_CONFIG, model, host.spec)
    here = host.config()
    for name in sorted(model.keys() & here.keys() - INERT_CONFIG):
        one, other = model[name], here[name]
        scalar = isinstance(one, str | int | float) and isinstance(other, str | int | float)
        if scalar and one != other and not any(part in name for part in ("dropout", "token_id", "output_")):
            raise InvalidAdapter(
                f"{MODEL_CONFIG}: {name} is {str(one)[:100]!r}, the backbone's is {other!r}",
                param=name,
                code="wrong_backbone",
            )
    return model


def check_backbone(where: str, said: Mapping[str, Any], spec: BackboneSpec) -> None:
    """Refuses a checkpoint that says it was made for another architecture or size."""
    for name, here in (("model_type", spec.model_type), ("hidden_size", spec.hidden_size)):
        if said.get(name, here) != here:
            raise InvalidAdapter(
                f"{where}: {name} is {str(said[name])[:100]!r}, the backbone's is {here!r}",
                param=name,
                code="wrong_backbone",
            )


def problem_task(model: Mapping[str, Any], outputs: int | None) -> str:
    """The task that config.json's problem_type means, given the number of the head's outputs, if that is known.

    Where nothing is said, a single one is a label that a text has or has not: transformers' pipeline takes the sigmoid.
    """
    problem = model.get("problem_type")
    if not (problem is None or isinstance(problem, str)) or problem not in PROBLEM_TASKS:
        raise refusal(MODEL_CONFIG, model, "problem_type", ", ".join(name for name in PROBLEM_TASKS if name))
    return "multi_label_classification" if problem is None and outputs == 1 else PROBLEM_TASKS[problem]


def by_index(document: Mapping[str, Any], where: str) -> list[Any] | None:
    """Label names in order, of an `id2label` or a `label2id` mapping; None where it has neither."""
    names = document.get("id2label")
    if isinstance(names, dict):
        if names.keys() != {str(index) for index in range(len(names))}:
            raise InvalidAdapter(f"{where}: the keys of id2label are not 0, 1, 2, ...", param="id2label")
        return [names[str(index)] for index in range(len(names))]
    indices = document.get("label2id")
    if isinstance(indices, dict):
        ordered = sorted(indices, key=lambda name: str(indices[name]).rjust(9, "0"))
        if [indices[name] for name in ordered] != list(range(len(indices))):
            raise InvalidAdapter(f"{where}: the values of label2id are not 0, 1, 2, ...", param="label2id")
        return list(ordered)
    return None


def label_names(
    files: Mapping[str, bytes], uploaded: Sequence[str] | None, stored: Sequence[Any] | None, outputs: int | None
) -> tuple[str, ...]:
    """The uploader's labels, those of a side file, or those that the checkpoint stores; one for each output."""
    names: Any = uploaded
    if names is None and LABELS in files:
        names = read_json_list(files, LABELS)
    if names is None:
        names = stored
    if names is None:
        raise InvalidAdapter(
            "the checkpoint does not name its labels; send the form field `labels`, a JSON list, or add "
            f"{LABELS} or {MODEL_CONFIG}",
            param="labels",
            code="missing_labels",
        )
    try:
        checked: tuple[str, ...] = TypeAdapter(Labels).validate_python(tuple(names))
    except ValidationError as error:
        reason = invalid_fields("labels", error).message
        raise InvalidAdapter(reason, param="labels", code="invalid_labels") from error
    if outputs is not None and len(checked) != outputs:
        raise InvalidAdapter(
            f"{len(checked)} labels for a classifier of {outputs} rows", param="labels", code="invalid_labels"
        )
    return checked


def refuse_labels(labels: Sequence[str] | None, what: str) -> None:
    """Refuses labels that the uploader sends for something that has none."""
    if labels is not None:
        raise InvalidAdapter(f"{what} has no labels; leave the field out", param="labels", code="invalid_labels")


def rows(tensors: Mapping[str, Tensor], name: str) -> int | None:
    """Rows of a matrix, if it is there and one."""
    tensor = tensors.get(name)
    return tensor.shape[0] if tensor is not None and tensor.ndim == 2 else None
