"""T5 v1.1's encoder as transformers' `T5EncoderModel`."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.rules import ConversionRule, Rules
from scaling.errors import UserError
from scaling.models.t5 import T5Encoder

UNUSED = (r"^decoder\.", r"^lm_head\.weight$")  # the decoder's parts of the whole model
MLP = "gated-gelu"  # the MLP of v1.1, with the tanh form of GELU

FIELDS = foreign.transformers(
    "t5",
    compared={
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    },
    only={"model_type": "t5", "dense_act_fn": "gelu_new", "is_gated_act": True},  # as MLP implies
    free="dropout_rate classifier_dropout eos_token_id is_decoder"  # the encoder is none, whatever this says
    " num_decoder_layers scale_decoder_outputs n_positions output_past",
)


def table(model: T5Encoder) -> Rules:
    """Returns the rules for the tensors of model.safetensors."""
    block, layers = "encoder.block.{i}.layer", range(model.depth)
    attention, mlp = f"{block}.0.SelfAttention", f"{block}.1.DenseReluDense"
    query, key, value, out = (f"{attention}.{name}" for name in "qkvo")
    return [
        ConversionRule(
            "shared.weight", ("params/tokens/embedding",), rules.SAME, echoes=("encoder.embed_tokens.weight",)
        ),
        *rules.tensor(f"{attention.format(i=0)}.relative_attention_bias.weight", "relative_bias"),
        *rules.norm(f"{block}.0.layer_norm", "blocks/norm_attention", layers, bias=False),
        *rules.attention(query, key, value, out, "blocks/attention", model.heads, layers, bias=False),
        *rules.norm(f"{block}.1.layer_norm", "blocks/norm_mlp", layers, bias=False),
        *rules.linear(f"{mlp}.wi_0", "blocks/mlp/gate", layers, bias=False),
        *rules.linear(f"{mlp}.wi_1", "blocks/mlp/up", layers, bias=False),
        *rules.linear(f"{mlp}.wo", "blocks/mlp/down", layers, bias=False),
        *rules.norm("encoder.final_layer_norm", "norm", bias=False),
    ]


def config(model: T5Encoder, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": model.vocabulary,
        "d_model": model.width,
        "d_kv": model.head_width,
        "d_ff": model.mlp_width,
        "num_layers": model.depth,
        "num_heads": model.heads,
        "relative_attention_num_buckets": model.buckets,
        "relative_attention_max_distance": model.max_distance,
        "layer_norm_epsilon": model.epsilon,
        "feed_forward_proj": MLP,
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if the MLP is another, as in the first T5, or the family does not have what a field states.
    """
    mlp = config.get("feed_forward_proj", FIELDS.compared["feed_forward_proj"])
    if mlp != MLP:
        raise UserError(f"feed_forward_proj={mlp}: must be {MLP}; only T5 v1.1 can be loaded")
    config = FIELDS.read(config)
    return {
        "vocabulary": config["vocab_size"],
        "width": config["d_model"],
        "head_width": config["d_kv"],
        "mlp_width": config["d_ff"],
        "depth": config["num_layers"],
        "heads": config["num_heads"],
        "buckets": config["relative_attention_num_buckets"],
        "max_distance": config["relative_attention_max_distance"],
        "epsilon": config["layer_norm_epsilon"],
    }


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    unused=UNUSED,
)
