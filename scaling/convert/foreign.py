"""The fields of a foreign config.json: those compared and those that cannot matter; any other is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scaling.errors import UserError
from scaling.validation import shown

# Fields of every transformers config: names, training, text generation, and how outputs are returned.
_TRANSFORMERS = """
_attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path architectures
attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
gradient_checkpointing id2label initializer_factor initializer_range is_encoder_decoder label2id
length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_labels
num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k
top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
LARGEST = 2**20  # of a size in a config.json: a vocabulary has at most a quarter of this
TRANSFORMERS = frozenset(_TRANSFORMERS.split())
DIFFUSERS = frozenset(["_diffusers_version", "_name_or_path", "dropout"])  # fields of every diffusers config
# Fields of every transformers config, with the only value that the families here support.
PLAIN: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
}


def require(family: str, stated: Mapping[str, Any], wanted: Mapping[str, Any], section: str = "") -> None:
    """Checks that config.json has no other value than the only one that a family supports.

    Raises:
        UserError: if a field of `stated` differs from its value in `wanted`.
    """
    for key, value in wanted.items():
        if stated.get(key, value) != value:
            name = f"{section}.{key}" if section else key
            raise UserError(f"{name}={shown(stated[key])}: the family {family} has {value!r} and no other")


@dataclass(frozen=True)
class Fields:
    """The fields that a config.json of a `family` may have.

    `compared` maps a field to the library's default, which holds where config.json leaves the field out.
    `only` maps a field to the one value that the family supports; this is the library's default too, unless
    `otherwise` gives another default. The fields in `free` do not change the outputs of evaluation.
    """

    family: str
    compared: Mapping[str, Any]
    only: Mapping[str, Any] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    otherwise: Mapping[str, Any] = field(default_factory=dict)

    def read(self, stated: Mapping[str, Any], section: str = "") -> dict[str, Any]:
        """Returns the compared fields, each with its value or its default.

        Raises:
            UserError: if the family does not have a field's value, or this table does not know a field; the
                message begins with the field.
        """
        require(self.family, {**self.otherwise, **stated}, self.only, section)
        for key, value in stated.items():
            known = key in self.only or key in self.compared or key in self.free
            if not known and value is not None:
                name = f"{section}.{key}" if section else key
                raise UserError(
                    f"{name}={shown(value)}: is no known field of the family {self.family}, and may change "
                    "what the model gives; if it does not, take it out"
                )
        for key, default in self.compared.items():
            value = stated.get(key, default)
            sizes = value if isinstance(value, list) else [value]
            large = any(isinstance(size, int) and abs(size) > LARGEST for size in sizes)
            if large or (value is None and default is not None):
                name = f"{section}.{key}" if section else key
                raise UserError(f"{name}={shown(value)}: is no size of a model; get the file again")
        return {key: stated.get(key, default) for key, default in self.compared.items()}


def transformers(
    family: str, compared: Mapping[str, Any], only: Mapping[str, Any] | None = None, free: str = ""
) -> Fields:
    """Returns the fields of a transformers config, with those that all such configs share.

    `free` holds the names of the family's own free fields, separated by spaces.
    """
    own = set(free.split())
    only = {key: value for key, value in PLAIN.items() if key not in own} | dict(only or {})
    return Fields(family, compared, only, (TRANSFORMERS | own) - set(compared) - set(only))
