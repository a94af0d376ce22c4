"""The preprocessing of images that a checkpoint's weights expect, to and from the keys of a run's config."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling import objectives
from scaling.convert import files
from scaling.data.transforms import INTERPOLATIONS, named
from scaling.errors import UserError
from scaling.preprocessing import OPENAI, Preprocessing
from scaling.run.options import Config

FILE = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # transformers 5's file, which may hold the content of `FILE` as a part
NAMES = {int(value): name for name, value in INTERPOLATIONS.items()}  # Pillow's number -> our name
# Kinds of processors that take a size of one number for the short side.
SHORT_SIDE = ("CLIP", "ConvNext", "VideoMAE", "Vilt", "Vivit")
# Defaults of transformers' processors (version 5) for fields that their file leaves out, by the kind of model
# in the processor's name. Vivit's is pixel / 127.5 - 1, and then the mean and standard deviation.
HALF = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
VIDEO = {**HALF, "resample": 2, "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}
KINDS: dict[str, dict[str, Any]] = {
    "CLIP": {**VIDEO, "resample": 3, "image_mean": OPENAI.mean, "image_std": OPENAI.std},
    "ConvNext": {**HALF, "resample": 3, "size": {"shortest_edge": 384}},
    "VideoMAE": VIDEO,
    "ViT": {**HALF, "resample": 2, "size": {"height": 224, "width": 224}},
    "Vilt": {**HALF, "resample": 3, "size": {"shortest_edge": 384}},
    "Vivit": {**VIDEO, "size": {"shortest_edge": 256}, "rescale_factor": 1 / 127.5, "offset": True},
}
KIND_OF = {  # the kind of processor for a family, where the file does not name one
    "clip": "CLIP", "resnet": "ConvNext", "swin": "ViT", "timesformer": "VideoMAE", "vilt": "Vilt",
    "vit": "ViT", "vivit": "Vivit",
}  # fmt: skip
# Fields that are read, and fields that do not change an image of pixels in three channels.
READ = """
crop_pct crop_size do_center_crop do_normalize do_rescale do_resize feature_extractor_type image_mean
image_processor_type image_std offset resample rescale_factor size
"""
IGNORED_FIELDS = """
_processor_class auto_map data_format default_to_square device disable_grouping do_convert_rgb do_pad
image_seq_length input_data_format max_image_length model_type pad_size processor_class return_tensors
size_divisor transformers_version
"""
KNOWN = frozenset((READ + IGNORED_FIELDS).split())


@dataclass(frozen=True)
class Seen:
    """The preprocessing between images and the inputs that a checkpoint's weights were trained on."""

    normalisation: Preprocessing
    source: str  # the file, or the custom, that states it
    short: float | None = None  # the short side before a central crop, in the units of `center_crop`
    square: bool = False  # whether the whole image is resized to a square
    side: int | None = None  # pixels of a side after the crop; None: the model's own side
    resample: str = "bicubic"
    notes: tuple[str, ...] = ()  # lines to report

    def transform(self, side: int) -> str | None:
        """Returns the transform that makes images of this side; None where they are not resized."""
        if self.square:
            return f"resize({self.resample})"
        if self.short is None:
            return None
        pixels = self.short > 1
        if pixels and self.side not in (None, side):
            return f"center_crop({self.side / self.short:.6g}, {self.resample})"  # type: ignore[operator]
        return f"center_crop({self.short:g}, {self.resample})"


def usual(of: str, normalisation: Preprocessing, **how: Any) -> Seen:
    """Returns the usual preprocessing of a kind of weights, for files that do not state it."""
    return Seen(normalisation, f"what is usual for {of}, since its files do not say", **how)


def read(source: Path, family: str) -> Seen | None:
    """Returns the preprocessing that a folder states; None for a file, or a folder that does not state it.

    It is read from preprocessor_config.json (or transformers 5's processor_config.json), or from the part
    "pretrained_cfg" of timm's config.json.

    Raises:
        UserError: if no run here can preprocess so; the message names the file and the field.
    """
    for name, part, parse in ((FILE, "", _parse_processor), (PROCESSOR, "image_processor", _parse_processor),
                              ("config.json", "pretrained_cfg", _parse_pretrained_cfg)):  # fmt: skip
        stated = files.read_config(source, name)
        stated = stated.get(part) if part and stated is not None else stated
        if not isinstance(stated, Mapping):
            continue
        try:
            return parse({key: value for key, value in stated.items() if value is not None}, name, family)
        except UserError as e:
            raise UserError(f"{source / name}: {e}") from None
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise UserError(
                f"{source / name}: cannot be read ({type(e).__name__}: {e}); mend it, or take it out"
            ) from None
    return None


def _parse_pretrained_cfg(stated: Mapping[str, Any], name: str, _: str) -> Seen:
    mode, share = stated.get("crop_mode", "center"), float(stated["crop_pct"])
    if mode not in ("center", "squash") or (mode == "squash" and share != 1.0):
        raise UserError(f"crop_mode={mode!r}: must be center, or squash with crop_pct=1")
    if stated["interpolation"] not in INTERPOLATIONS:
        raise UserError(
            f"interpolation={stated['interpolation']!r}: must be one of {', '.join(INTERPOLATIONS)}"
        )
    normalisation = Preprocessing(tuple(stated["mean"]), tuple(stated["std"]))
    how = {"square": True} if mode == "squash" else {"short": share}
    return Seen(_merge_channels(normalisation), name, resample=stated["interpolation"], **how)


def _parse_processor(stated: Mapping[str, Any], name: str, family: str) -> Seen:
    for key, value in stated.items():
        if key not in KNOWN and value is not False:
            raise UserError(f"{key}={value!r}: is not known here; if it changes no image, take it out")
    processor = str(stated.get("image_processor_type", stated.get("feature_extractor_type", "")))
    kind = re.sub(r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "", processor) or KIND_OF.get(family, "")
    stated = {**KINDS.get(kind, {}), **stated}
    for key in _required_fields(stated):
        if key not in stated:
            raise UserError(
                f"{key}: is absent, and not known of {processor or 'a processor without name'}; add it"
            )
    normalisation = _normalisation(stated)
    if not stated.get("do_resize", True):
        if stated.get("do_center_crop", False):
            raise UserError(
                "do_resize=False: with do_center_crop=True images are cropped alone; no run does so"
            )
        return Seen(normalisation, name)
    resample = NAMES.get(stated["resample"])
    if resample is None:
        choices = ", ".join(f"{number} ({NAMES[number]})" for number in sorted(NAMES))
        raise UserError(f"resample={stated['resample']}: must be one of {choices}")
    seen = Seen(normalisation, name, resample=resample)
    return dataclasses.replace(seen, **_size_fields(stated, kind))


def _required_fields(stated: Mapping[str, Any]) -> list[str]:
    """Returns the fields without which the stated ones do not determine the processed image."""
    keys = ["image_mean", "image_std"] if stated.get("do_normalize", True) else []
    if not stated.get("do_resize", True):
        return keys
    crops = "crop_size" in stated or stated.get("do_center_crop", False)
    return [*keys, "resample", "size", *(("do_center_crop", "crop_size") if crops else ())]


def _normalisation(stated: Mapping[str, Any]) -> Preprocessing:
    """Converts (pixel * factor + offset - mean) / std to the form that takes pixels in 0..1."""
    factor = float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1.0
    offset = -1.0 if stated.get("offset", False) and stated.get("do_rescale", True) else 0.0
    mean, std = [0.0], [1.0]
    if stated.get("do_normalize", True):
        mean, std = (_floats(stated[key]) for key in ("image_mean", "image_std"))
    unit = 255 * factor
    means = tuple(round((m - offset) / unit, 8) for m in mean)
    stds = tuple(round(s / unit, 8) for s in std)
    return _merge_channels(Preprocessing(means, stds))


def _merge_channels(normalisation: Preprocessing) -> Preprocessing:
    """Returns the same normalisation, with one number where all channels have the same."""
    pairs = {*zip(normalisation.mean, normalisation.std, strict=True)}
    return Preprocessing(*zip(*pairs, strict=True)) if len(pairs) == 1 else normalisation


def _floats(value: Any) -> list[float]:
    return [float(each) for each in value] if isinstance(value, list | tuple) else [float(value)]


def _size_fields(stated: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Returns the fields of `Seen` that follow from the stated sizes."""
    size, crop = stated["size"], stated.get("crop_size")
    if isinstance(size, int):
        size = {"shortest_edge": size} if kind in SHORT_SIDE else {"height": size, "width": size}
    crop = crop if stated.get("do_center_crop", False) else None
    for key, value in (("size", size), ("crop_size", crop)):
        if isinstance(value, Mapping) and value.get("height") != value.get("width"):
            return {"notes": (f"images become {key}={value} in this format; give them that size",)}
    square, side = (_side(value) for value in (size if "height" in size else None, crop))
    if square is not None and side in (None, square):
        return {"square": True, "side": square}
    if square is not None:
        raise UserError(f"size={square}: with crop_size={side} images are resized twice; no run does so")
    short = int(size["shortest_edge"])
    if side is not None and side > short:
        raise UserError(
            f"crop_size={side}: images of a short side of {short} would be padded; no run does so"
        )
    if side is not None:
        return {"short": float(short), "side": side}
    if kind == "ConvNext" and short < 384:
        return {"short": float(int(short / stated.get("crop_pct", 0.875))), "side": short}
    if kind == "ConvNext":
        return {"square": True, "side": short}
    note = "images keep their ratio in this format, and are squares here"
    return {"notes": (note,)}


def _side(square: Any) -> int | None:
    return int(square["height"]) if isinstance(square, Mapping) else square


def changes(
    seen: Seen, cfg: Config, shape: tuple[int, ...], kept: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Returns the new values of config keys that make a run preprocess as `seen`, and the lines to report.

    `shape` is that of the model's images, [..., H, W, C]. Keys in `kept` stay as they were given.
    """
    height, side, channels = shape[-3:]
    if len(seen.normalisation.mean) not in (1, channels):
        current = f"(pixel / 255 - {cfg.preprocessing.mean}) / {cfg.preprocessing.std}"
        return {}, [f"preprocessing: stays {current}; {seen.source} has none for {channels} channels"]
    wanted: dict[str, Any] = {
        f"preprocessing.{key}": getattr(seen.normalisation, key) for key in ("mean", "std")
    }
    notes = [f"preprocessing: {note}" for note in seen.notes]
    transform = seen.transform(side)
    if transform is not None and height != side:
        notes.append(f"preprocessing: {transform} is left out, as it gives squares, and images are {shape}")
    elif transform is not None and (
        cfg.data.image_size is not None or not objectives.trains(cfg.objective.name)
    ):
        wanted |= _crop_keys(transform, cfg, side)
    new: dict[str, Any] = {}
    for key, value in wanted.items():
        before = _value(cfg, key)
        if key in kept and before != value:
            notes.append(f"{key}={before} as given, where {seen.source} has {value}")
        elif key not in kept and before != value:
            new[key] = value
    if new:
        notes.append(f"{', '.join(f'{key}={value}' for key, value in new.items())}: by {seen.source}")
    return new, notes


def _crop_keys(transform: str, cfg: Config, side: int) -> dict[str, Any]:
    """Returns the keys for `transform` in evaluation; none where its transforms are equivalent already."""
    if not objectives.trains(cfg.objective.name):  # without data, the crop is the model's
        return {
            "data.image_size": side,
            "data.train_transforms": (transform,),
            "data.eval_transforms": (transform,),
        }
    if [_resolve(name, side) for name in cfg.data.eval_transforms] == [_resolve(transform, side)]:
        return {}
    return {"data.eval_transforms": (transform,)}


def _resolve(name: str, side: int) -> tuple[Any, ...]:
    """Returns what a transform does to make images of this side, the same for every spelling of its name."""
    options = named(name).options()
    short = options.get("short", 0.875)
    pixels = int(side / short) if short <= 1 else int(short)
    plain = name.partition("(")[0]
    resample = options.get("resample", INTERPOLATIONS["bicubic"])
    return plain, pixels if plain == "center_crop" else None, resample


def _value(cfg: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(cfg, section), name)


def described(cfg: Config, shape: tuple[int, ...]) -> tuple[dict[str, Any], list[str]]:
    """Returns preprocessor_config.json for a run's weights, and a line for what it cannot hold.

    `shape` is that of the model's images, [..., H, W, C].
    """
    side, channels = shape[-2], shape[-1]
    transforms, notes = cfg.data.eval_transforms, []
    kind = "VideoMAEImageProcessor" if len(shape) == 4 else "ViTImageProcessor"
    sizes: dict[str, Any] = {"do_resize": False, "do_center_crop": False}
    if len(transforms) == 1 and transforms[0].partition("(")[0] in ("center_crop", "resize"):
        plain, short, resample = _resolve(transforms[0], side)
        square = {"height": side, "width": side}
        sizes = {"do_resize": True, "resample": int(resample), "size": square, "do_center_crop": False}
        if plain == "center_crop":
            kind = "VideoMAEImageProcessor" if len(shape) == 4 else "CLIPImageProcessor"
            sizes |= {"size": {"shortest_edge": short}, "do_center_crop": True, "crop_size": square}
    elif transforms:
        notes.append(f"{FILE}: leaves out data.eval_transforms={transforms}, which it has no words for")
    mean, std = (
        [*values] * (channels if len(values) == 1 else 1)
        for values in (cfg.preprocessing.mean, cfg.preprocessing.std)
    )
    stated = {"image_processor_type": kind, **sizes, "do_rescale": True, "rescale_factor": 1 / 255}
    stated |= {"do_normalize": True, "image_mean": mean, "image_std": std}
    return stated | ({"do_convert_rgb": channels == 3} if kind.startswith("CLIP") else {}), notes
