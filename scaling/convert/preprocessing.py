"""Reads how images reach a checkpoint's weights, as keys of a run's config, and writes it."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.convert import files
from scaling.data.transforms import INTERPOLATIONS, named
from scaling.engine.config import Config
from scaling.errors import UserError
from scaling.preprocessing import OPENAI, Preprocessing

FILE = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # of transformers 5, which may hold the former as a part
NAMES = {int(value): name for name, value in INTERPOLATIONS.items()}  # by Pillow's numbers
SHORT_SIDE = ("CLIP", "ConvNext", "VideoMAE", "Vilt", "Vivit")  # whose size of one number is the short side
# What transformers' processors take for what their file leaves out, by the kind of model that they are named
# after (its version 5; Vivit: a pixel / 127.5 - 1, and then the mean and deviation).
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
KIND_OF = {  # a family's, where the file does not name one
    "clip": "CLIP", "resnet": "ConvNext", "swin": "ViT", "timesformer": "VideoMAE", "vilt": "Vilt",
    "vit": "ViT", "vivit": "Vivit",
}  # fmt: skip
# What is read, and what changes no image of pixels in three channels.
READ = """
crop_pct crop_size do_center_crop do_normalize do_rescale do_resize feature_extractor_type image_mean
image_processor_type image_std offset resample rescale_factor size
"""
FREE = """
_processor_class auto_map data_format default_to_square device disable_grouping do_convert_rgb do_pad
image_seq_length input_data_format max_image_length model_type pad_size processor_class return_tensors
size_divisor transformers_version
"""
KNOWN = frozenset((READ + FREE).split())


@dataclass(frozen=True)
class Seen:
    """How images become what weights see; `source` is what says so."""

    normalisation: Preprocessing
    source: str
    short: float | None = None  # what the short side becomes before a central crop, as `center_crop` has it
    square: bool = False  # all of the image is resized to a square
    side: int | None = None  # pixels, to which they are cropped; None: the model's own
    resample: str = "bicubic"
    notes: tuple[str, ...] = ()

    def transform(self, side: int) -> str | None:
        """The transform that makes images of this side; None where they are not resized."""
        if self.square:
            return f"resize({self.resample})"
        if self.short is None:
            return None
        pixels = self.short > 1
        if pixels and self.side not in (None, side):
            return f"center_crop({self.side / self.short:.6g}, {self.resample})"  # type: ignore[operator]
        return f"center_crop({self.short:g}, {self.resample})"


def usual(of: str, normalisation: Preprocessing, **how: Any) -> Seen:
    """Returns what weights of a kind usually see, where their files do not say it."""
    return Seen(normalisation, f"what is usual for {of}, since its files do not say", **how)


def read(source: Path, family: str) -> Seen | None:
    """Returns what a folder says of a family's images; None for a file, and a folder that does not say it.

    It is read in preprocessor_config.json (or transformers 5's processor_config.json), or in the part
    "pretrained_cfg" of timm's config.json.

    Raises: UserError, which names the file and the field, for what no run here can do.
    """
    for name, part, parse in ((FILE, "", _parsed), (PROCESSOR, "image_processor", _parsed),
                              ("config.json", "pretrained_cfg", _timms)):  # fmt: skip
        stated = files.read_config(source, name)
        stated = stated.get(part) if part and stated is not None else stated
        if not isinstance(stated, Mapping):
            continue
        try:
            return parse({key: value for key, value in stated.items() if value is not None}, name, family)
        except UserError as e:
            raise UserError(f"{source / name}: {e}") from None
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise UserError(
                f"{source / name}: cannot be read ({type(e).__name__}: {e}); mend it, or take it out"
            ) from None
    return None


def _timms(stated: Mapping[str, Any], name: str, _: str) -> Seen:
    mode, share = stated.get("crop_mode", "center"), float(stated["crop_pct"])
    if mode not in ("center", "squash") or (mode == "squash" and share != 1.0):
        raise UserError(f"crop_mode={mode!r}: must be center, or squash with crop_pct=1")
    if stated["interpolation"] not in INTERPOLATIONS:
        raise UserError(
            f"interpolation={stated['interpolation']!r}: must be one of {', '.join(INTERPOLATIONS)}"
        )
    normalisation = Preprocessing(tuple(stated["mean"]), tuple(stated["std"]))
    how = {"square": True} if mode == "squash" else {"short": share}
    return Seen(_alike(normalisation), name, resample=stated["interpolation"], **how)


def _parsed(stated: Mapping[str, Any], name: str, family: str) -> Seen:
    for key, value in stated.items():
        if key not in KNOWN and value is not False:
            raise UserError(f"{key}={value!r}: is not known here; if it changes no image, take it out")
    named = str(stated.get("image_processor_type", stated.get("feature_extractor_type", "")))
    kind = re.sub(r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "", named) or KIND_OF.get(family, "")
    stated = {**KINDS.get(kind, {}), **stated}
    for key in _decisive(stated):
        if key not in stated:
            raise UserError(
                f"{key}: is absent, and not known of {named or 'a processor without name'}; add it"
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
        known = ", ".join(f"{number} ({NAMES[number]})" for number in sorted(NAMES))
        raise UserError(f"resample={stated['resample']}: must be one of {known}")
    seen = Seen(normalisation, name, resample=resample)
    return dataclasses.replace(seen, **_sizes(stated, kind))


def _decisive(stated: Mapping[str, Any]) -> list[str]:
    """The fields without which these do not say what becomes of an image."""
    keys = ["image_mean", "image_std"] if stated.get("do_normalize", True) else []
    if not stated.get("do_resize", True):
        return keys
    crops = "crop_size" in stated or stated.get("do_center_crop", False)
    return [*keys, "resample", "size", *(("do_center_crop", "crop_size") if crops else ())]


def _normalisation(stated: Mapping[str, Any]) -> Preprocessing:
    """(pixel * factor + offset - mean) / std, in the form that has pixels in 0..1."""
    factor = float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1.0
    offset = -1.0 if stated.get("offset", False) and stated.get("do_rescale", True) else 0.0
    mean, std = [0.0], [1.0]
    if stated.get("do_normalize", True):
        mean, std = (_numbers(stated[key]) for key in ("image_mean", "image_std"))
    unit = 255 * factor
    means = tuple(round((m - offset) / unit, 8) for m in mean)
    stds = tuple(round(s / unit, 8) for s in std)
    return _alike(Preprocessing(means, stds))


def _alike(normalisation: Preprocessing) -> Preprocessing:
    """The same with one number where all channels have the same."""
    pairs = {*zip(normalisation.mean, normalisation.std, strict=True)}
    return Preprocessing(*zip(*pairs, strict=True)) if len(pairs) == 1 else normalisation


def _numbers(value: Any) -> list[float]:
    return [float(each) for each in value] if isinstance(value, list | tuple) else [float(value)]


def _sizes(stated: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of `Seen` that sizes decide."""
    size, crop = stated["size"], stated.get("crop_size")
    if isinstance(size, int):
        size = {"shortest_edge": size} if kind in SHORT_SIDE else {"height": size, "width": size}
    crop = crop if stated.get("do_center_crop", False) else None
    for key, given in (("size", size), ("crop_size", crop)):
        if isinstance(given, Mapping) and given.get("height") != given.get("width"):
            return {"notes": (f"images become {key}={given} in this format; give them that size",)}
    square, side = (_side(given) for given in (size if "height" in size else None, crop))
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
    """Returns the keys of a run's config that become what its weights saw, and what is to be said of it.

    `shape` is that of the model's images, [..., H, W, C]. Keys in `kept` stay as they were given.
    """
    given: dict[str, Any] = {}
    height, side, channels = shape[-3:]
    if len(seen.normalisation.mean) in (1, channels):
        given |= {f"preprocessing.{key}": getattr(seen.normalisation, key) for key in ("mean", "std")}
    else:
        own = f"(pixel / 255 - {cfg.preprocessing.mean}) / {cfg.preprocessing.std}"
        return {}, [f"preprocessing: stays {own}; {seen.source} has none for {channels} channels"]
    said = [f"preprocessing: {note}" for note in seen.notes]
    transform = seen.transform(side)
    if transform is not None and height != side:
        said.append(f"preprocessing: {transform} is left out, as it gives squares, and images are {shape}")
    elif transform is not None and (cfg.data.image_size is not None or not cfg.trains):
        given |= _crops(transform, cfg, side)
    new: dict[str, Any] = {}
    for key, value in given.items():
        before = _value(cfg, key)
        if key in kept and before != value:
            said.append(f"{key}={before} as given, where {seen.source} has {value}")
        elif key not in kept and before != value:
            new[key] = value
    if new:
        said.append(f"{', '.join(f'{key}={value}' for key, value in new.items())}: by {seen.source}")
    return new, said


def _crops(transform: str, cfg: Config, side: int) -> dict[str, Any]:
    """The keys that say how evaluation crops, where it does so otherwise today."""
    if not cfg.trains:  # there are no data, and what they would be cropped to is the model's
        return {"data.image_size": side, "data.augment": (transform,), "data.eval_transforms": (transform,)}
    if [_resolved(name, side) for name in cfg.data.eval_transforms] == [_resolved(transform, side)]:
        return {}
    return {"data.eval_transforms": (transform,)}


def _resolved(name: str, side: int) -> tuple[Any, ...]:
    """Returns how a transform makes images of this side, whatever its name says of it."""
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
    """Returns preprocessor_config.json for a run's weights, and what cannot stand in it.

    `shape` is that of the model's images, [..., H, W, C].
    """
    side, channels = shape[-2], shape[-1]
    names, said = cfg.data.eval_transforms, []
    kind = "VideoMAEImageProcessor" if len(shape) == 4 else "ViTImageProcessor"
    sizes: dict[str, Any] = {"do_resize": False, "do_center_crop": False}
    if len(names) == 1 and names[0].partition("(")[0] in ("center_crop", "resize"):
        plain, short, resample = _resolved(names[0], side)
        square = {"height": side, "width": side}
        sizes = {"do_resize": True, "resample": int(resample), "size": square, "do_center_crop": False}
        if plain == "center_crop":
            kind = "VideoMAEImageProcessor" if len(shape) == 4 else "CLIPImageProcessor"
            sizes |= {"size": {"shortest_edge": short}, "do_center_crop": True, "crop_size": square}
    elif names:
        said.append(f"{FILE}: leaves out data.eval_transforms={names}, which it has no words for")
    mean, std = (
        [*values] * (channels if len(values) == 1 else 1)
        for values in (cfg.preprocessing.mean, cfg.preprocessing.std)
    )
    stated = {"image_processor_type": kind, **sizes, "do_rescale": True, "rescale_factor": 1 / 255}
    stated |= {"do_normalize": True, "image_mean": mean, "image_std": std}
    return stated | ({"do_convert_rgb": channels == 3} if kind.startswith("CLIP") else {}), said
