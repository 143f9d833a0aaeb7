"""Where adapters touch each architecture: the only file that names an architecture's modules."""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from server.core import Pooling, Site, SiteKind


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths of one architecture. `{}` stands for the layer's number."""

    attention_output: str
    """The linear layer whose output, the attention's, joins the residual stream."""
    ffn_output: str
    """The same for the feed-forward network."""
    targets: tuple[str, ...]
    """The attention's query and value projections: where LoRA goes by default."""
    classifier_pooling: Pooling | None = None
    """Set where transformers' sequence classifier is one linear layer on this pooling."""
    positions_after_padding: bool = False
    """Position ids start after `pad_token_id` instead of at 0."""


BERT = Family(
    attention_output="encoder.layer.{}.attention.output.dense",
    ffn_output="encoder.layer.{}.output.dense",
    targets=("query", "value"),
    classifier_pooling=Pooling.POOLER,
)
ROBERTA = Family(
    attention_output=BERT.attention_output,
    ffn_output=BERT.ffn_output,
    targets=BERT.targets,
    positions_after_padding=True,
)

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "electra": Family(
        attention_output=BERT.attention_output,
        ffn_output=BERT.ffn_output,
        targets=BERT.targets,
    ),
    "distilbert": Family(
        attention_output="transformer.layer.{}.attention.out_lin",
        ffn_output="transformer.layer.{}.ffn.lin2",
        targets=("q_lin", "v_lin"),
    ),
    "mpnet": Family(
        attention_output="encoder.layer.{}.attention.attn.o",
        ffn_output="encoder.layer.{}.output.dense",
        targets=("attn.q", "attn.v"),
        positions_after_padding=True,
    ),
    "deberta-v2": Family(
        attention_output=BERT.attention_output,
        ffn_output=BERT.ffn_output,
        targets=("query_proj", "value_proj"),
    ),
}
"""By transformers' `model_type`. A family that is not listed is served with linear methods, found by module name."""


def find_sites(model: nn.Module, config: PretrainedConfig) -> dict[Site, tuple[nn.Module, int, int]]:
    """Every place of a model that may be a site: its module and the sizes of its input and output."""
    sites: dict[Site, tuple[nn.Module, int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites[Site(SiteKind.LINEAR, name)] = (module, module.in_features, module.out_features)
    family = FAMILIES.get(config.model_type)
    if family is not None:
        for layer in range(config.num_hidden_layers):
            for place, path in (("attention", family.attention_output), ("ffn", family.ffn_output)):
                module = model.get_submodule(path.format(layer))
                sites[Site(SiteKind.RESIDUAL, f"{layer}.{place}")] = (module, config.hidden_size, config.hidden_size)
    return sites


def first_position(config: PretrainedConfig) -> int:
    """The position id of a text's first token."""
    family = FAMILIES.get(config.model_type)
    return config.pad_token_id + 1 if family is not None and family.positions_after_padding else 0
