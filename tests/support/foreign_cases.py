"""One small model of each class of another library that has a config.json, and the config of ours for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from scaling.run.options import Config
from scaling.training import config

PRETRAINED = str(Path(__file__).parents[2] / "configs/pretrained.py")
WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
OURS = {"width": 24, "depth": 2, "heads": 3}
Call = Callable[[Any, dict[str, torch.Tensor]], Any]


@dataclass(frozen=True)
class Case:
    """A class of a library, small: how it is made, called, and named in a config of ours."""

    format: str
    family: str
    variant: str
    options: dict[str, Any]  # of our model
    make: Callable[[], Any]
    call: Call
    inputs: dict[str, np.ndarray]
    read: Callable[[Any], Any] = lambda out: out  # ours, in the form of theirs
    method: str | None = None  # of ours

    def config(self) -> Config:
        overrides = {f"model.{key}": value for key, value in self.options.items()}
        return config.load(f"{PRETRAINED}:{self.family}/{self.variant}", overrides)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def pixels(x: torch.Tensor) -> torch.Tensor:
    """[..., H, W, C] -> [..., C, H, W]."""
    return x.movedim(-1, -3)


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return model(pixels(inputs["x"])).logits


def clips(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return [embed / embed.norm(dim=-1, keepdim=True) for embed in _towers(model, inputs)] + [
        model.logit_scale.exp()
    ]


def _towers(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(input_ids=inputs["text"].long(), pixel_values=pixels(inputs["x"]))
    return out.image_embeds, out.text_embeds


def words(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    text, mask, x = inputs["text"].long(), inputs["mask"].long(), pixels(inputs["x"])
    grid = torch.ones((len(x), *x.shape[-2:]), dtype=torch.long)
    return model(input_ids=text, attention_mask=mask, pixel_values=x, pixel_mask=grid).logits


def encoded(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    mask = inputs["mask"]
    out = model(input_ids=inputs["text"].long(), attention_mask=mask.long()).last_hidden_state
    return torch.where(mask[:, :, None], out, 0)


def denoised(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    y = inputs["y"].long()
    if isinstance(model, diffusers.UNet2DConditionModel):
        y = torch.nn.functional.one_hot(y, 11).float()[:, None]
    x, t = pixels(inputs["x"]), inputs["t"]
    return model(x, t if isinstance(model, diffusers.UNet2DModel) else t.long(), y).sample.movedim(1, -1)


def moments(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    found = model.encode(pixels(inputs["x"])).latent_dist
    return found.mean.movedim(1, -1), found.logvar.movedim(1, -1)


TEXT = np.array([[28, 4, 5, 29, 3, 2, 7, 0, 0], [28, 9, 29, 0, 0, 0, 0, 0, 0]], np.int32)
LONG = np.array([[28, 4, 5, 29, 3, 2, 7], [28, 9, 29, 0, 0, 0, 0]], np.int32)
DENOISE = {"t": np.array([3.0, 700.0], np.float32), "y": np.array([4, 10], np.int32)}


def clip() -> Any:
    tower = {**WIDE, "layer_norm_eps": 1e-3}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=10,
            vision_config={**tower, "image_size": 12, "patch_size": 4},
            text_config={**tower, "vocab_size": 30, "max_position_embeddings": 9, "eos_token_id": 29},
        )
    )


def unet(kind: str) -> Any:
    down, up, middle = {
        "adm": ("AttnDownBlock2D", "AttnUpBlock2D", {}),
        "ldm": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", {"attention_head_dim": 2}),
    }[kind]
    shared = dict(
        sample_size=4, down_block_types=[down, "ResnetDownsampleBlock2D"], block_out_channels=[8, 24],
        up_block_types=["ResnetUpsampleBlock2D", up], layers_per_block=1, norm_num_groups=4, norm_eps=1e-3,
    )  # fmt: skip
    if kind == "adm":
        return diffusers.UNet2DModel(
            **shared, in_channels=1, out_channels=2, downsample_type="resnet", upsample_type="resnet",
            resnet_time_scale_shift="scale_shift", attention_head_dim=4, attn_norm_num_groups=4,
            num_class_embeds=11,
        )  # fmt: skip
    shared |= dict(down_block_types=[down, "DownBlock2D"], up_block_types=["UpBlock2D", up])
    return diffusers.UNet2DConditionModel(
        **shared, **middle, in_channels=1, out_channels=1, cross_attention_dim=12, encoder_hid_dim=11,
        encoder_hid_dim_type="text_proj",
    )  # fmt: skip


# What folders of transformers 4 (4.20 to 4.57, as those versions write them) have beside today's fields.
OF_FOUR: dict[str, Any] = {
    "torchscript": False, "torch_dtype": "float32", "use_bfloat16": False, "tf_legacy_loss": False,
    "pruned_heads": {}, "tie_word_embeddings": True, "is_decoder": False, "add_cross_attention": False,
    "cross_attention_hidden_size": None, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0,
    "do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "finetuning_task": None, "tokenizer_class": None,
    "prefix": None, "bos_token_id": 0, "pad_token_id": 1, "sep_token_id": None, "_commit_hash": None,
    "decoder_start_token_id": None, "task_specific_params": None, "_attn_implementation_autoset": False,
}  # fmt: skip
FOURS_OWN: dict[str, dict[str, Any]] = {
    "swin": {"path_norm": True},
    "vilt": {"tie_word_embeddings": False},  # though they are tied
    "clip": {"text_config_dict": None, "vision_config_dict": None},
    "t5": {"n_positions": 512, "output_past": True},
}

CASES = {
    "vit": Case(
        "huggingface", "vit", "B/16",
        {**OURS, "patch": 4, "resolution": [12, 20], "epsilon": 1e-3, "num_classes": 7},
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
            **WIDE, image_size=[12, 20], patch_size=4, layer_norm_eps=1e-3, num_labels=7)),
        logits, {"x": images(2, 12, 20, 3)},
    ),
    "swin": Case(
        "huggingface", "swin", "T",
        {"width": 8, "depths": (2, 2), "heads": (1, 2), "window": 4, "patch": 2, "num_classes": 7,
         "mlp_ratio": 3.0, "resolution": 32},
        lambda: transformers.SwinForImageClassification(transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4,
            mlp_ratio=3.0, num_labels=7)),
        logits, {"x": images(2, 32, 32, 3)},
    ),
    "resnet": Case(
        "huggingface", "resnet", "50",
        {"width": 4, "depths": (2, 1, 1, 1), "bottleneck": True, "num_classes": 7},
        lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[16, 32, 64, 128], depths=[2, 1, 1, 1], num_labels=7)),
        logits, {"x": images(2, 64, 64, 3)},
    ),
    "clip": Case(
        "huggingface", "clip", "ViT-B/32",
        {**OURS, "patch": 4, "resolution": 12, "embed_dim": 10, "text_width": 24, "text_depth": 2,
         "text_heads": 3, "vocabulary": 30, "context": 9, "epsilon": 1e-3},
        clip, clips, {"x": images(2, 12, 12, 3), "text": TEXT},
        read=lambda out: [out.image, out.text, out.scale],
    ),
    "vilt": Case(
        "huggingface", "vilt", "B/32",
        {**OURS, "patch": 4, "resolution": 12, "vocabulary": 30, "length": 7, "epsilon": 1e-3,
         "tasks": ("mlm",)},
        lambda: transformers.ViltForMaskedLM(transformers.ViltConfig(
            **WIDE, image_size=12, patch_size=4, vocab_size=30, max_position_embeddings=7,
            layer_norm_eps=1e-3)),
        words, {"x": images(2, 12, 12, 3), "text": LONG, "mask": LONG > 0},
        read=lambda out: out["mlm"],
    ),
    "vivit": Case(
        "huggingface", "vivit", "B/16x2",
        {**OURS, "patch": 4, "tubelet": 2, "resolution": 8, "frames": 4, "epsilon": 1e-3, "num_classes": 7,
         "activation": "gelu_tanh"},
        lambda: transformers.VivitForVideoClassification(transformers.VivitConfig(
            **WIDE, image_size=8, num_frames=4, tubelet_size=[2, 4, 4], layer_norm_eps=1e-3, num_labels=7)),
        logits, {"x": images(2, 4, 8, 8, 3)},
    ),
    "timesformer": Case(
        "huggingface", "timesformer", "B/16",
        {**OURS, "patch": 4, "resolution": 8, "frames": 3, "epsilon": 1e-3, "num_classes": 7},
        lambda: transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(
            **WIDE, image_size=8, patch_size=4, num_frames=3, layer_norm_eps=1e-3, num_labels=7)),
        logits, {"x": images(2, 3, 8, 8, 3)},
    ),
    "t5": Case(
        "huggingface", "t5", "Small",
        {**OURS, "head_width": 4, "mlp_width": 40, "vocabulary": 30, "buckets": 8, "max_distance": 20,
         "epsilon": 1e-3},
        lambda: transformers.T5EncoderModel(transformers.T5Config(
            vocab_size=30, d_model=24, d_kv=4, d_ff=40, num_layers=2, num_heads=3,
            relative_attention_num_buckets=8, relative_attention_max_distance=20, layer_norm_epsilon=1e-3,
            feed_forward_proj="gated-gelu")),
        encoded, {"text": np.tile(LONG, 4), "mask": np.tile(LONG, 4) > 0},
    ),
    "dit": Case(
        "diffusers", "dit", "S/8", {**OURS, "num_classes": 10, "patch": 8},
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=3, attention_head_dim=8, num_layers=2, out_channels=8, patch_size=8,
            num_embeds_ada_norm=10, norm_eps=1e-3),
        denoised, {"x": images(2, 32, 32, 4), **DENOISE},
    ),
    "adm": Case(
        "diffusers", "unet", "small",
        {"width": 8, "groups": 4, "num_classes": 10, "depth": 1, "epsilon": 1e-3, "kind": "adm", "heads": 0,
         "multipliers": (1, 3), "attention": (1,), "head_width": 4, "learn_sigma": True},
        lambda: unet("adm"), denoised, {"x": images(2, 4, 4, 1), **DENOISE},
    ),
    "ldm": Case(
        "diffusers", "unet", "small",
        {"width": 8, "groups": 4, "num_classes": 10, "depth": 1, "epsilon": 1e-3, "kind": "ldm", "heads": 2,
         "multipliers": (1, 3), "attention": (1,), "context": 12, "learn_sigma": False},
        lambda: unet("ldm"), denoised, {"x": images(2, 4, 4, 1), **DENOISE},
    ),
    "vae": Case(
        "diffusers", "vae", "small",
        {"widths": (4, 8), "blocks": 1, "groups": 2, "latent_channels": 3, "channels": 3,
         "latent_scale": 0.5},
        lambda: diffusers.AutoencoderKL(
            block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, latent_channels=3,
            scaling_factor=0.5, down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2),
        moments, {"x": images(2, 8, 8, 3)}, method="moments",
    ),
}  # fmt: skip
