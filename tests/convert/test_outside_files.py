"""Checkpoints of every format with anything in them: read as they are, or refused in one line."""

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from scaling.convert import FORMATS, preprocessing, rules, transfer
from scaling.convert.converter import Converter
from scaling.errors import UserError
from scaling.run import config as run_config
from scaling.run.options import Config
from tests.support.foreign_cases import CASES

WIDE = {"width": 64, "heads": 1, "text_width": 64, "text_heads": 1, "activation": "quick_gelu"}
STATED = [f"{case.format} {name}" for name, case in CASES.items()]  # the formats with a config.json
BARE = [
    *("timm vit", "timm swin", "microsoft swin"),
    *("torchvision resnet", "facebookresearch dit", "openai clip"),
]
LOOKED_AT = ("pos", "bias_table", "time_embeddings", "cls", "encoder_hid_proj.bias")  # parts of names


@dataclasses.dataclass(frozen=True)
class Whole:
    """A small checkpoint as a format has it, and the config that it fits."""

    format: str
    config: Config
    converter: Converter[Any]
    model: Any
    tensors: Mapping[str, np.ndarray]
    stated: dict[str, Any] | None  # the content of config.json

    def open(self, folder: Path) -> transfer.Opened:
        return transfer.open_checkpoint(self.format, folder, self.config)


@functools.cache
def whole(kind: str) -> Whole:
    name, case_name = kind.split()
    case = CASES[case_name]
    options = {**case.options, **({**WIDE, "epsilon": 1e-5} if name == "openai" else {})}
    config = dataclasses.replace(case, options=options).config()
    run, converter = transfer._build(config), FORMATS[name].families[case.family]
    shapes = jax.eval_shape(run.objective.init, jax.random.key(0), run.batch(1))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(  # of numbers that every type of floats has
        lambda leaf: (rng.integers(-64, 64, leaf.shape) / 64).astype(np.float32), shapes
    )
    inputs = transfer._inputs(run)
    tensors = rules.save(converter.table(run.model), variables) | converter.buffers(run.model, inputs)
    stated = converter.config_file and converter.config_file.config(run.model, inputs)
    return Whole(name, config, converter, run.model, tensors, json.loads(json.dumps(stated)))


@pytest.fixture
def made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and shapes are made once for each config and each model, which takes most of the time."""
    build, eval_shape = transfer._build, jax.eval_shape
    runs: dict[str, Any] = {}
    shapes: dict[Any, Any] = {}

    def build_once(cfg: Config) -> Any:
        key = json.dumps(cfg.raw)
        runs[key] = runs.get(key) or build(cfg)
        return runs[key]

    def shapes_once(init: Callable[..., Any], *arguments: Any) -> Any:
        objective = getattr(init, "__self__", None)
        if objective is None:
            return eval_shape(init, *arguments)
        shapes[objective] = shapes.get(objective) or eval_shape(init, *arguments)
        return shapes[objective]

    monkeypatch.setattr(transfer, "_build", build_once)
    monkeypatch.setattr(jax, "eval_shape", shapes_once)


# --- tensors ---

NAMES = st.text(max_size=5) | st.sampled_from(
    [".", "a\nb", "\x1b[2J", "\u2028", "head.weight", "module.", "fc_norm.bias", "{i}", "x" * 99, "pooler.\n"]
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 5), max_size=5)
DTYPES = (np.float16, np.float64, ml_dtypes.bfloat16, np.int32, np.int64, np.uint8, np.bool_)
CHANGES = st.one_of(
    st.tuples(st.just("dropped"), st.none()),
    st.tuples(st.just("renamed"), NAMES),
    st.tuples(st.just("before"), st.sampled_from(["module.", "model.", "_orig_mod.", "vit.", "a\n"])),
    st.tuples(st.just("beside"), st.tuples(NAMES, SHAPES)),
    st.tuples(st.just("shaped"), SHAPES),
    st.tuples(st.just("longer"), st.tuples(st.integers(-1, 4), st.integers(0, 9))),
    st.tuples(st.just("typed"), st.sampled_from(DTYPES)),
    st.tuples(st.just("filled"), st.sampled_from([np.nan, np.inf, -np.inf, 1e300])),
)


def changed(tensor: np.ndarray, kind: str, how: Any) -> np.ndarray:
    if kind == "typed":
        with np.errstate(over="ignore", invalid="ignore"):
            return tensor.astype(how)
    if kind == "filled":
        filled = tensor.astype(np.float64)
        filled.reshape(-1)[:1] = how
        return filled
    if kind == "longer" and tensor.ndim:
        axis, size = how
        shape = [*tensor.shape]
        shape[axis % tensor.ndim] = size
        return np.zeros(shape, np.float32)
    return np.zeros(how, np.float32) if kind == "shaped" else tensor


@pytest.mark.usefixtures("made_once")
@pytest.mark.parametrize("kind", [*STATED, *BARE])
def test_tensors_are_read_as_they_are_or_refused(kind: str) -> None:
    """Under whatever names, of whatever shapes and types; what only has another float type is read."""
    known = whole(kind)
    names = sorted(known.tensors)
    looked_at = [name for name in names if any(part in name for part in LOOKED_AT)] or names
    which = st.sampled_from(looked_at) | st.sampled_from(names)

    @given(st.lists(st.tuples(which, CHANGES), min_size=1, max_size=3))
    @settings(max_examples=30)
    def check(changes: list[tuple[str, tuple[str, Any]]]) -> None:
        tensors = dict(known.tensors)
        called = {name: name for name in tensors}  # what each is called in the file
        beside: dict[str, np.ndarray] = {}
        for name, (what, how) in changes:
            if what == "beside":
                beside[how[0]] = np.ones(how[1], np.float32)
            elif what in ("renamed", "before"):
                called[name] = f"{how}{called[name]}" if what == "before" else how
            elif what == "dropped":
                called[name] = ""
            else:
                tensors[name] = changed(tensors[name], what, how)
        file = beside | {called[name]: tensor for name, tensor in tensors.items() if called[name]}
        found = read_or_refuse(known, file, known.stated)
        if found is None:
            floats = all(what == "typed" and np.dtype(how).kind in rules.FLOATS for _, (what, how) in changes)
            assert not floats, changes
            return
        opened, variables = found
        for name, tensor in rules.save(known.converter.table(opened.model), variables).items():
            np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))
            assert tensors[name].dtype.kind in rules.FLOATS and np.isfinite(tensor).all()

    check()


def read_or_refuse(
    known: Whole, tensors: Mapping[str, np.ndarray], stated: Any
) -> tuple[transfer.Opened, dict[str, Any]] | None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(
            {name: np.asarray(t, order="C") for name, t in tensors.items()}, folder / "model.safetensors"
        )
        if stated is not None:
            (folder / "config.json").write_text(json.dumps(stated))
        try:
            opened = known.open(folder)
            assert not any("\n" in line for line in opened.said)
            return opened, opened.read(folder)
        except UserError as e:
            assert str(e) and "\n" not in str(e)
            return None


# --- config.json ---

SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from([10**30, -(10**400), 1e999, "gelu", "bottleneck", "AutoencoderKL"])
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def fields_of(stated: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths to all fields, to those of sections too, and to a few that are not there."""
    more = dict.fromkeys(("a\nb", "pruned_heads", "crc32", "vision_config_dict"))
    for key, value in {**more, **stated}.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *inner) for inner in fields_of(value))


def near(value: Any) -> list[Any]:
    """Values that differ from one in their type alone, or by a little."""
    number = isinstance(value, int | float) and abs(value) < 2**40
    numbers = [value + 1, -value, float(value), str(value)] if number else []
    lists = [value[:-1], [*value, 0]] if isinstance(value, list) else []
    return [None, [value], {"a": value}, *numbers, *lists]


@pytest.mark.usefixtures("made_once")
@pytest.mark.parametrize("kind", STATED)
def test_any_config_json_is_read_or_refused(kind: str) -> None:
    """What is then read has the tensors of the file, and what config.json says of the model, or says not."""
    known = whole(kind)
    written, config_file = known.stated, known.converter.config_file
    assert written is not None and config_file is not None
    says, model = config_file.fields, config_file.fields(written)
    given_fields = list(dict.fromkeys(fields_of(written)))

    @given(st.data())
    @settings(max_examples=40)
    def check(data: st.DataObject) -> None:
        stated = copy.deepcopy(written)
        for path in data.draw(st.lists(st.sampled_from(given_fields), min_size=1, max_size=2)):
            place: Any = stated
            for key in path[:-1]:
                place = place[key] if isinstance(place, dict) and key in place else {}
            if isinstance(place, dict):
                place[path[-1]] = data.draw(st.sampled_from(near(place.get(path[-1]))) | JSON)
        found = read_or_refuse(known, known.tensors, stated)
        if found is not None:
            opened, variables = found
            kept = rules.save(known.converter.table(opened.model), variables)
            assert kept.keys() <= known.tensors.keys()
            assert all(np.array_equal(tensor, known.tensors[name]) for name, tensor in kept.items())
            for field, value in says(stated).items():
                assert value == model[field] or any(field in line for line in opened.said)

    check()


@pytest.mark.parametrize("side", [0, -8, 3])
def test_a_size_that_no_model_has_is_refused(side: int) -> None:
    known = whole("huggingface vivit")  # the only one whose resolution config.json alone decides
    assert known.stated is not None
    assert read_or_refuse(known, known.tensors, {**known.stated, "image_size": side}) is None


# --- preprocessor_config.json ---

NUMBERS = st.sampled_from([0, 1, -1, 0.5, 8, 224, 256, 1e999, -1e999, np.nan, 10**30, 1e-320, True, None])
SIDES = st.sampled_from(["height", "width", "shortest_edge", "longest_edge"])
SIZES = NUMBERS | st.dictionaries(SIDES, NUMBERS, max_size=3)
FACTORS = st.sampled_from([[0.5, 0.25, 0.125], [0.5] * 3, 0.5]) | st.lists(NUMBERS, max_size=4) | NUMBERS
PROCESSORS = st.sampled_from(["CLIPImageProcessor", "ConvNextFeatureExtractor", "VivitImageProcessor"])
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "offset")
STEPS = st.fixed_dictionaries(
    {},
    optional={
        "image_processor_type": PROCESSORS, "size": SIZES, "crop_size": SIZES, "crop_pct": NUMBERS,
        "rescale_factor": NUMBERS, "resample": NUMBERS | JSON, "image_mean": FACTORS, "image_std": FACTORS,
        **dict.fromkeys(SWITCHES, st.booleans() | st.booleans() | JSON),
    },
)  # fmt: skip
INTERPOLATIONS = st.sampled_from(["bicubic", "bilinear", "x"]) | JSON
TIMM = st.fixed_dictionaries(
    {"mean": FACTORS, "std": FACTORS, "crop_pct": NUMBERS, "interpolation": INTERPOLATIONS},
    optional={"crop_mode": st.sampled_from(["center", "squash", "border"])},
)


@pytest.mark.parametrize("family", ["vit", "clip", "resnet", "vivit", "vilt"])
@given(STEPS)
@example({"size": {"shortest_edge": 1e999}})
@example({"size": {"height": 1e999, "width": 1e999}})
@settings(max_examples=150)
def test_any_preprocessor_config_is_read_or_refused(family: str, stated: dict[str, Any]) -> None:
    """Alone or as a part of transformers 5's file, which is the same."""
    found = [
        normalisation_of(family, {"preprocessor_config.json": stated}),
        normalisation_of(family, {"processor_config.json": {"image_processor": stated}}),
    ]
    assert found[0] == found[1]


@given(TIMM | JSON)
@settings(max_examples=150)
def test_any_pretrained_cfg_is_read_or_refused(stated: Any) -> None:
    found = normalisation_of("vit", {"config.json": {"pretrained_cfg": stated}})
    if found is not None and len(stated["mean"]) in (1, 3):  # of other numbers of channels nothing is taken
        assert [set(each) for each in found] == [set(stated["mean"]), set(stated["std"])]


def normalisation_of(family: str, files: Mapping[str, Any]) -> list[tuple[float, ...]] | None:
    """Means and standard deviations of the family's run with a folder's preprocessing; None if refused."""
    cfg = whole(f"huggingface {family}").config
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_text(json.dumps(content))
        try:
            seen = preprocessing.read(Path(folder), family)
            if seen is None:
                return None
            run = run_config.changed(cfg, preprocessing.changes(seen, cfg, (24, 24, 3))[0])
        except UserError as e:
            assert str(e) and "\n" not in str(e)
            return None
    found = run.preprocessing
    assert np.isfinite([*found.mean, *found.std]).all() and min(found.std) > 0
    return [found.mean, found.std]
