"""Multi-label classification of texts: the same head, and for each label a probability of its own."""

import torch.nn.functional as F
from torch import Tensor

from server.core import Prediction
from server.tasks.classification import Classification

LIKELY = 0.5


class MultiLabelClassification(Classification):
    """Any number of labels per text."""

    name = "multi_label_classification"
    min_labels = 1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy; `targets` [texts, labels] are 0 or 1."""
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))

    def scores(self, outputs: Tensor) -> Tensor:
        """Logits [texts, labels] as probabilities."""
        return outputs.float().sigmoid()

    def agrees(self, one: Prediction, other: Prediction) -> bool:
        """Whether the same labels are more likely than not."""
        return _likely(one) == _likely(other)


def _likely(prediction: Prediction) -> set[str]:
    return {score.label for score in prediction if score.score >= LIKELY}
