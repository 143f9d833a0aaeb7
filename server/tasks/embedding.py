"""Embedding: the vector of a text, for search and for comparing texts by their cosine."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.states import TextStates
from server.core import BackboneSpec, EmbedOptions, Encoding, Pooling, Route, TextInput
from server.errors import InvalidAdapter, InvalidRequest
from server.tasks.examples import Example, Text
from server.tasks.head import HeadConfig
from server.tasks.metrics import Report
from server.tasks.pooled import PooledTask, need_pooling

AGREEMENT = 0.99
"""The cosine from which on two vectors say the same."""

SCALE = 20.0
"""What cosines are multiplied by before their softmax; sentence-transformers' default, a temperature of 0.05."""

QUERIES = 1024
"""Texts that are compared with all candidates at once, when vectors are measured."""


class EmbeddingConfig(HeadConfig):
    """How token states become the vector of a text."""

    pooling: Pooling = Pooling.MEAN
    normalize: bool = True
    """Whether vectors have length 1, unless the request says otherwise."""


class PairedTexts(Example):
    """Two texts that belong together: a question and its answer, a sentence and the same in other words."""

    text: Text
    text_pair: Text

    def inputs(self) -> tuple[TextInput, ...]:
        """Each for itself."""
        return TextInput(self.text), TextInput(self.text_pair)


class Embedding(PooledTask[EmbeddingConfig, Pooling, EmbedOptions, PairedTexts]):
    """One vector per text. It has no tensors: what is trained is the rest of the adapter."""

    name = "embedding"
    route = Route.EMBED
    Config = EmbeddingConfig
    options = EmbedOptions
    example = PairedTexts
    prediction = list[float]
    measured = EmbedOptions(normalize=True)
    measured_rows = 5_000  # each is compared with all others
    decisive = {"mrr": 1, "recall_at_1": 1}

    def check(self, config: EmbeddingConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """No labels, and a pooling that the backbone has."""
        if labels:
            raise InvalidAdapter(f"{self.name} has no labels, not {len(labels)}", param="labels", code="invalid_labels")
        need_pooling(config.pooling, spec)

    def shapes(self, config: EmbeddingConfig, labels: Sequence[str], spec: BackboneSpec) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def init(
        self, config: EmbeddingConfig, labels: Sequence[str], spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """None."""
        return {}

    def bind(self, config: EmbeddingConfig, tensors: Mapping[str, Tensor]) -> Pooling:
        """The pooling is all that there is."""
        return config.pooling

    def apply(self, head: Pooling, states: TextStates, start: int, end: int) -> Tensor:
        """The vectors [texts, hidden], in float32, as long as they come."""
        return states.pooled(head)[start:end]

    def check_options(self, config: EmbeddingConfig, options: EmbedOptions, spec: BackboneSpec) -> None:
        """No more dimensions than there are, and the pooling that the adapter was trained with."""
        size = spec.hidden_size
        if options.dimensions is not None and not 1 <= options.dimensions <= size:
            raise InvalidRequest(
                f"dimensions is {options.dimensions}, vectors have {size}: 1 to {size} may be asked for",
                param="dimensions",
            )
        if options.pooling not in (None, config.pooling):
            raise InvalidRequest(
                f"the adapter was made for pooling {config.pooling}, not {options.pooling}", param="pooling"
            )

    def decode(
        self, outputs: Tensor, config: EmbeddingConfig, labels: Sequence[str], options: EmbedOptions
    ) -> list[list[float]]:
        """The vectors [texts, hidden], cut to `dimensions` and only then of length 1; one of zeros stays that."""
        vectors = outputs[:, : options.dimensions]
        normalize = config.normalize if options.normalize is None else options.normalize
        # in float32, the square of a finite number may not be finite, which would make zeros of the vector
        rows: list[list[float]] = (F.normalize(vectors.double(), dim=-1).float() if normalize else vectors).tolist()
        return rows

    def agrees(self, one: Sequence[float], other: Sequence[float]) -> bool:
        """Whether they point in nearly the same direction; vectors of zeros agree with each other."""
        a, b = torch.tensor([one, other], dtype=torch.float64)
        return bool(F.cosine_similarity(a, b, dim=0) >= AGREEMENT) or not (a.any() or b.any())

    def targets(self, examples: Sequence[PairedTexts], texts: Sequence[Encoding], labels: Sequence[str]) -> Tensor:
        """For each pair [pairs], which of the batch's second texts belongs to its first one."""
        return torch.arange(len(examples))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How badly each first text is told which of the batch's second texts is its own; `outputs` alternate.

        The multiple negatives ranking loss of Henderson et al. 2017, "Efficient Natural Language Response Suggestion
        for Smart Reply", section 4.4, over scaled cosines as sentence-transformers computes it.
        """
        vectors = F.normalize(outputs.float(), dim=-1)
        return F.cross_entropy(SCALE * vectors[0::2] @ vectors[1::2].T, targets)

    def kept(self, prediction: Sequence[float]) -> Tensor:
        """The vector in float32, an eighth of a list of numbers."""
        return torch.tensor(prediction)

    def measure(self, examples: Sequence[PairedTexts], predictions: Sequence[Sequence[float] | Tensor]) -> Report:
        """`recall_at_1` and `mrr`: each first text looks for its own among all second ones, each of those once.

        `predictions` are vectors of length 1, two for each row. Of texts that are equally near, its own comes last.
        """
        vectors = torch.stack([torch.as_tensor(prediction) for prediction in predictions])
        number = {text: index for index, text in enumerate(dict.fromkeys(row.text_pair for row in examples))}
        own = torch.tensor([number[row.text_pair] for row in examples])
        candidates = torch.empty(len(number), vectors.shape[-1]).index_copy_(0, own, vectors[1::2])
        ranks = torch.cat(
            [
                _ranks(queries @ candidates.T, wanted)
                for queries, wanted in zip(torch.split(vectors[0::2], QUERIES), torch.split(own, QUERIES), strict=True)
            ]
        )
        metrics = {"recall_at_1": (ranks == 1).double().mean().item(), "mrr": ranks.double().reciprocal().mean().item()}
        return Report(len(examples), metrics)


def _ranks(scores: Tensor, wanted: Tensor) -> Tensor:
    """How many of each row [queries, candidates] score at least as high as the wanted one, itself included."""
    return (scores >= scores.gather(1, wanted[:, None])).sum(1)
