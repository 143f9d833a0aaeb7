"""Tasks. Adding one is a file beside these and a line in TASKS."""

from server.tasks.base import AnyTask
from server.tasks.classification import Classification

TASKS: dict[str, AnyTask] = {
    "classification": Classification(),
}
