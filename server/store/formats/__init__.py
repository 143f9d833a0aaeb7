"""Checkpoint files, as their libraries save them, to the neutral artifact."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from server.adapters.base import Host
from server.errors import InvalidAdapter
from server.store.artifact import MANIFEST, TENSORS, Artifact
from server.store.formats import adapterhub, classifier, peft
from server.store.formats.files import required
from server.store.formats.reading import MODEL_CONFIG, read_json

ACCEPTED = (
    f"adapterd ({MANIFEST}, {TENSORS}), PEFT ({peft.CONFIG}, {peft.TENSORS}), AdapterHub ({adapterhub.CONFIG}, "
    f"{adapterhub.TENSORS}, {adapterhub.HEAD_CONFIG}, {adapterhub.HEAD_TENSORS}), a model with a head whose body is "
    f"the backbone ({MODEL_CONFIG}, {classifier.TENSORS})"
)


def read_checkpoint(files: Mapping[str, bytes], labels: Sequence[str] | None, host: Host) -> Artifact:
    """The artifact in a set of files, keyed by path; they may lie in one folder of any name.

    `labels` are the uploader's, for checkpoints that do not name them. Raises InvalidAdapter naming the file, tensor
    or field. Files that belong to no format (a README, a tokenizer) are left alone.
    """
    paths = [PurePosixPath(path) for path in files]
    anchors = [path for path in paths if path.name in (MANIFEST, peft.CONFIG)]
    # a whole model's config.json may lie beside an adapter, to name its labels
    anchors = anchors or [path for path in paths if path.name == MODEL_CONFIG]
    if len(anchors) != 1:
        seen = f"found several: {', '.join(map(str, anchors))}"[:300] if anchors else "found none"
        raise InvalidAdapter(
            f"exactly one adapter is needed, {seen}; accepted: {ACCEPTED}", param="files", code="unknown_format"
        )
    anchor = anchors[0]
    folder = anchor.parent
    inside = {str(path.relative_to(folder)): files[str(path)] for path in paths if path.is_relative_to(folder)}
    if anchor.name == MODEL_CONFIG:
        return classifier.read(inside, labels, host)
    if anchor.name == peft.CONFIG:
        read = adapterhub.read if adapterhub.recognizes(read_json(inside, peft.CONFIG)) else peft.read
        return read(inside, labels, host)
    if labels is not None:
        raise InvalidAdapter(f"{MANIFEST} names the labels; leave the field out", param="labels")
    return Artifact.uploaded(read_json(inside, MANIFEST), required(inside, TENSORS))
