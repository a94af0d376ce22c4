"""ViLT as transformers' `ViltModel`, `ViltForMaskedLM`, and the models of its other tasks."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, layouts, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import ConversionRule, Rules, Tensors
from scaling.errors import UserError
from scaling.models.vilt import ViLT
from scaling.preprocessing import SYMMETRIC

# A model's tasks -> its class in transformers, which has no heads for itm and mpp.
ARCHITECTURES: dict[tuple[str, ...], str] = {
    (): "ViltModel",
    ("mlm",): "ViltForMaskedLM",
    ("vqa",): "ViltForQuestionAnswering",
    ("retrieval",): "ViltForImageAndTextRetrieval",
    ("nlvr2",): "ViltForImagesAndTextClassification",
}
FIELDS = foreign.transformers(
    "vilt",
    compared={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "image_size": 384,
        "patch_size": 32,
        "vocab_size": 30522,
        "max_position_embeddings": 40,
        "architectures": None,
    },
    only={
        "model_type": "vilt",
        "hidden_act": "gelu",
        "qkv_bias": True,
        "max_image_length": -1,  # any other value chooses patches at random
    },
    free="hidden_dropout_prob attention_probs_dropout_prob"
    " num_channels type_vocab_size modality_type_vocab_size num_images",  # the tensors' shapes have them
)
BASE = "vilt."
IGNORED = (r"\bposition_ids$",)  # 0, 1, 2, ...: older folders hold them


def table(model: ViLT) -> Rules:
    """Returns the rules for the tensors of model.safetensors.

    Raises:
        UserError: if transformers has no model for the tasks.
    """
    base = _trunk_prefix(model)
    embeddings, block, layers = f"{base}embeddings", f"{base}encoder.layer.{{i}}", range(model.depth)
    text, patches = f"{embeddings}.text_embeddings", f"{embeddings}.patch_embeddings.projection"
    # The word table is also the output layer for masked words, which older files hold a second time.
    tied = ("mlm_score.decoder.weight",) if model.tasks == ("mlm",) else ()
    return [
        ConversionRule(f"{text}.word_embeddings.weight", ("params/word/embedding",), rules.SAME, echoes=tied),
        *rules.tensor(f"{text}.position_embeddings.weight", "text/positions"),
        *rules.tensor(f"{text}.token_type_embeddings.weight", "text/segment_embedding"),
        *rules.norm(f"{text}.LayerNorm", "text/norm"),
        *rules.linear(patches, "image/patch", shape=rules.patches(model.patch, model.patch)),
        *rules.tensor(f"{embeddings}.cls_token", "image/token", rules.LEADING),
        *rules.tensor(f"{embeddings}.position_embeddings", "image/positions", rules.LEADING),
        *rules.tensor(f"{embeddings}.token_type_embeddings.weight", "modality_embedding"),
        *layouts.blocks(layouts.TRANSFORMERS, block, "blocks", model.heads, layers),
        *rules.norm(f"{base}layernorm", "norm"),
        *rules.linear(f"{base}pooler.dense", "pooler"),
        *_head(model),
    ]


def source(model: ViLT, tensors: Tensors, config: Mapping[str, Any] | None) -> ViLT:
    """Returns the model at the resolution of config.json, or without it at that of the position table."""
    side = None if config is None else FIELDS.read(config)["image_size"]
    positions = tensors.get(f"{_trunk_prefix(model)}embeddings.position_embeddings")
    return layouts.with_resolution(model, positions, model.patch, stated=side)


def _trunk_prefix(model: ViLT) -> str:
    """Returns the prefix of the trunk's names."""
    return "" if _architecture(model) == "ViltModel" else "vilt."


def _head(model: ViLT) -> Rules:
    if model.tasks == ("mlm",):
        return [
            *rules.linear("mlm_score.transform.dense", "mlm/dense"),
            *rules.norm("mlm_score.transform.LayerNorm", "mlm/norm"),
            ConversionRule(
                "mlm_score.decoder.bias", ("params/mlm/bias",), rules.SAME, echoes=("mlm_score.bias",)
            ),
        ]
    if model.tasks == ("retrieval",):
        return rules.linear("rank_output", "retrieval")
    return [
        rule
        for task in model.tasks  # vqa or nlvr2
        for rule in (
            *rules.linear("classifier.0", f"{task}/up"),
            *rules.norm("classifier.1", f"{task}/norm"),
            *rules.linear("classifier.3", f"{task}/head"),
        )
    ]


def _architecture(model: ViLT) -> str:
    if model.tasks not in ARCHITECTURES:
        choices = ", ".join(filter(None, map(",".join, ARCHITECTURES)))
        raise UserError(
            f"tasks={','.join(model.tasks)}: transformers has ViLT for no task, or one of {choices}"
        )
    return ARCHITECTURES[model.tasks]


def config(model: ViLT, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises:
        UserError: if transformers has no model for the tasks, or the resolution is not square.
    """
    square = isinstance(model.resolution, int) or model.resolution[0] == model.resolution[1]
    if not square:
        raise UserError(f"resolution={model.resolution}: must be square, which transformers' ViLT always is")
    pair = "nlvr2" in model.tasks
    return {
        "architectures": [_architecture(model)],
        "model_type": "vilt",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": round(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": model.epsilon,
        "image_size": model.resolution if isinstance(model.resolution, int) else model.resolution[0],
        "patch_size": model.patch,
        "num_channels": inputs["x"].shape[-1],
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.length,
        "type_vocab_size": 2,
        "modality_type_vocab_size": 3 if pair else 2,
        "num_images": 2 if pair else -1,
        "max_image_length": -1,
        **layouts.labels(2 if pair else model.num_classes),
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if the architecture has no form here, or the family does not have what a field states.
    """
    config = FIELDS.read(config)
    tasks = {name: tasks for tasks, name in ARCHITECTURES.items()}
    name = (config["architectures"] or ["none"])[0]
    if name not in tasks:
        raise UserError(f"architectures={name}: must be one of {', '.join(tasks)}")
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "patch": config["patch_size"],
        "vocabulary": config["vocab_size"],
        "length": config["max_position_embeddings"],
        "epsilon": config["layer_norm_eps"],
        "tasks": tasks[name],
    }


def preprocessing(model: ViLT) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("ViLT", SYMMETRIC)


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    ignored=IGNORED,
    base=BASE,
    source=source,
    preprocessing=preprocessing,
)
