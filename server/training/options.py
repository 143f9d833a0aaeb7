"""Every option of training, its default and the reason for it. No torch here, so that `--help` is quick."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from server.settings import DeviceChoice, Settings

_SERVED = Settings.model_fields


class TrainOptions(BaseModel):
    """Options of `adapterd train`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(description="Rows to train on, JSON Lines, in the form of the task: see docs/tasks.md.")
    eval: Path | None = Field(None, description="Rows to measure the trained adapter on, in the same form.")
    task: str = Field("classification", description="What the adapter is for, e.g. `regression` or `tagging`.")
    method: str = Field("lora", description="Adapter method, e.g. `lora` or `bottleneck`.")
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description="Options of the method, over its own defaults: `r=16`, `mh_adapter=true`."
    )
    head: dict[str, JsonValue] = Field(
        default_factory=dict, description="Options of the task's head, over its own defaults: `hidden_layers=1`."
    )
    name: str | None = Field(None, description="Publish the adapter in the store under this name.")
    store: str = Field(_SERVED["store"].default, description="Adapter store that `name` is published in.")
    backbone: str = Field(
        _SERVED["backbone"].default, description="Backbone to train on: a folder, a hub id or an installed package."
    )
    device: DeviceChoice = Field("auto", description="`auto` takes CUDA where there is one, else the CPU.")
    # Not `auto` as in serving: bfloat16 rounds the forward pass to 8 bits, and the gradients with it. An adapter that
    # was trained in float32 can be served in either.
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format of the backbone.")
    epochs: int = Field(4, ge=1, description="Passes over the training rows.")
    learning_rate: float = Field(
        2e-3, gt=0, allow_inf_nan=False, description="Highest learning rate, reached after the warmup."
    )
    batch_size: int = Field(16, ge=1, description="Rows per step.")
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="AdamW's decay.")
    warmup: float = Field(
        0.1, ge=0, le=1, description="Share of the steps in which the learning rate rises; it falls in the others."
    )
    max_tokens: int | None = Field(
        None, ge=8, description="Cut training texts to this many tokens; without it, to the backbone's length."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Start of the random numbers: initial tensors, order of rows.")
