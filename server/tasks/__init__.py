"""Tasks. Adding one is a file beside these and a line in TASKS."""

from server.tasks.base import AnyTask
from server.tasks.classification import Classification
from server.tasks.embedding import Embedding
from server.tasks.multi_label import MultiLabelClassification
from server.tasks.question_answering import QuestionAnswering
from server.tasks.regression import Regression
from server.tasks.relation_extraction import RelationExtraction
from server.tasks.tagging import Tagging

TASKS: dict[str, AnyTask] = {
    task.name: task
    for task in (
        Classification(),
        MultiLabelClassification(),
        Regression(),
        RelationExtraction(),
        Tagging(),
        QuestionAnswering(),
        Embedding(),
    )
}
