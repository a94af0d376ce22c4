"""Every field of every foreign config.json: none is imported with other outputs than its library's, unsaid.

A small model of each class is saved by its library. Then each field of its config.json is changed in turn,
and taken out, and fields that the library would also read are put in. What the library then computes with the
same tensors must be what the import computes, or the import refuses, or names the field.
"""

import copy
import functools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from scaling.convert import FORMATS, foreign, transfer
from scaling.engine import config
from scaling.errors import UserError
from tests.models import parity

PRETRAINED = str(Path(__file__).parents[2] / "configs/pretrained.py")
RNG = np.random.default_rng(0)
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

    def config(self) -> config.Config:
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

# What no saved folder has by itself, and a library reads.
ADDED: dict[str, dict[str, Any]] = {
    "huggingface": {"max_image_length": 3, "add_cross_attention": True, "pruned_heads": {"0": [1]},
                    "quantization_config": {"load_in_8bit": True}, "something_new": 1},
    "diffusers": {"something_new": 1, "interpolation_scale": 2.0},
}  # fmt: skip
# Fields that no function of the model is of: the scale of latents is the run's, not the network's.
BESIDE = {"vae": ("scaling_factor",)}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
    yield
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_warning()


def others(key: str, value: Any) -> list[Any]:
    """Other values of a field, some of which its library takes."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value, 1] if value > 0 else [value + 1, 3]
    if isinstance(value, float):
        return [2 * value + 0.1]
    if key == "_class_name":
        return ["Transformer2DModel", "UNet2DModel", "UNet2DConditionModel"]
    if key in ("hidden_act", "act_fn", "activation_fn", "dense_act_fn", "pooler_act"):
        return ["relu", "gelu", "gelu_new", "quick_gelu", "gelu-approximate", "silu"]
    if key == "feed_forward_proj":
        return ["gated-silu", "relu", "gelu"]
    if isinstance(value, str):
        return [f"{value}_other", "default", "ada_norm", "basic"]
    if isinstance(value, list):
        return [value[::-1], [each + 1 if isinstance(each, int) else each for each in value], value[:1]]
    if isinstance(value, dict):
        return [{}]
    return [1, True, "text"]


def changes(case: str, stated: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was changed, the whole config) for every field, nested ones too."""
    for section in (None, *(k for k, v in stated.items() if k.endswith("_config") and isinstance(v, dict))):
        fields = stated if section is None else stated[section]
        added = ADDED[CASES[case].format]
        for key, value in [*fields.items(), *((k, None) for k in added if k not in fields)]:
            if key in BESIDE.get(case, ()):
                continue
            new = [added[key]] if key in added and key not in fields else [*others(key, value), ...]
            for each in new:
                whole = copy.deepcopy(stated)
                place = whole if section is None else whole[section]
                if each is ...:
                    del place[key]
                else:
                    place[key] = each
                yield f"{section or ''}.{key}={'absent' if each is ... else each}", whole


def theirs(case: Case, cls: Any, folder: Path) -> Any:
    """What the library computes from a folder; None where it cannot, or starts tensors afresh."""
    torch.manual_seed(0)
    try:
        model, report = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        if any(
            report[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys") if key in report
        ):
            return None
        inputs = {name: torch.from_numpy(x) for name, x in case.inputs.items()}
        with torch.no_grad():
            out = jax.tree.map(lambda t: t.float().numpy(), case.call(model.eval().float(), inputs))
    except Exception:
        return None
    return out if all(np.isfinite(each).all() for each in jax.tree.leaves(out)) else None


def ours(case: Case, opened: transfer.Opened, folder: Path, known: dict[Any, Any]) -> Any:
    """What our model computes, which is `known` once it was computed: only config.json changes."""
    if opened.model not in known:
        call = parity.jit(functools.partial(opened.model.apply, method=case.method))
        known[opened.model] = case.read(call(opened.read(folder), **case.inputs))
    return known[opened.model]


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        np.shape(a) == np.shape(b) and np.abs(np.asarray(a) - b).max() <= 1e-4 * np.abs(b).max()
        for a, b in pairs
    )


def saved(name: str, folder: Path) -> type:
    """Saves the small model, with random weights that its format allows, and returns its class."""
    model = CASES[name].make()
    parity.randomise(model, 0.3)
    if name == "ldm":
        model.encoder_hid_proj.bias.data.zero_()
    if name == "dit":
        embedders = [block.norm1.emb for block in model.transformer_blocks]
        embedders[1].load_state_dict(embedders[0].state_dict())
    model.save_pretrained(folder)
    return type(model)


@pytest.mark.parametrize("name", CASES)
def test_no_field_is_imported_with_other_outputs_unsaid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder, built, known = CASES[name], tmp_path / name, {}, {}
    build = transfer._build

    def once(cfg: config.Config) -> Any:  # most of the time would be spent on building the same again
        key = json.dumps(cfg.raw)
        built[key] = built.get(key) or build(cfg)
        return built[key]

    monkeypatch.setattr(transfer, "_build", once)
    cls = saved(name, folder)
    stated = json.loads((folder / "config.json").read_text())
    cfg = case.config()
    opened = transfer.open_checkpoint(case.format, folder, cfg)
    assert same(ours(case, opened, folder, known), theirs(case, cls, folder))

    refused, silent = [], []
    for change, whole in changes(name, stated):
        (folder / "config.json").write_text(json.dumps(whole))
        try:
            opened = transfer.open_checkpoint(case.format, folder, cfg)
            found = ours(case, opened, folder, known)
        except UserError as e:
            assert "\n" not in str(e)
            refused.append(change)
            continue
        now = theirs(case, cls, folder)
        key = change.partition("=")[0].rpartition(".")[2]
        if now is not None and not same(found, now) and not any(key in line for line in opened.said):
            silent.append(change)
    assert silent == []
    assert len(refused) >= 10, refused
    assert not any(change.startswith((".dtype", ".transformers_version")) for change in refused)


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_the_librarys_own(name: str) -> None:
    """What a table takes for a field that is absent, and that it knows every field that there is."""
    case = CASES[name]
    module = FORMATS[case.format].families[case.family]
    for table, cls in _tables(name, module):
        library = _defaults(cls)
        own = {key for key in library if key not in foreign.TRANSFORMERS | foreign.DIFFUSERS}
        assert own <= table.compared.keys() | table.only.keys() | table.free, own
        for key, value in {**table.only, **table.compared, **table.otherwise}.items():
            if key in library and key not in ("model_type", "architectures", "_class_name"):
                listed = list(value) if isinstance(value, tuple) else value
                skipped = key.endswith("_block_types") or key == "block_out_channels"
                follows = key in ("dense_act_fn", "is_gated_act")  # of feed_forward_proj
                assert skipped or follows or listed == library[key], key


def _tables(name: str, module: Any) -> list[tuple[foreign.Fields, Any]]:
    if name == "clip":
        towers = {"vision_config": transformers.CLIPVisionConfig, "text_config": transformers.CLIPTextConfig}
        return [(module.TOWERS[key], cls) for key, cls in towers.items()]
    if name in ("adm", "ldm"):
        return [(module.FIELDS[name], type(CASES[name].make()))]
    made = type(CASES[name].make())
    return [(module.FIELDS, getattr(made, "config_class", None) or made)]


def _defaults(cls: Any) -> dict[str, Any]:
    if issubclass(cls, transformers.PretrainedConfig):
        return {key: value for key, value in cls().to_dict().items() if key != "model_type"}
    import inspect

    parameters = inspect.signature(cls.__init__).parameters
    made = {key: p.default for key, p in parameters.items() if key != "self"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in made.items()}
