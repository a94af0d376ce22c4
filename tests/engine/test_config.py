"""Configs: every key is checked before anything is compiled, and every key is read by something."""

import ast
import dataclasses
import gzip
import io
import re
import tarfile
from pathlib import Path

import jax
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from scaling.engine import build, config, state
from scaling.engine.evaluate import EVALUATORS
from scaling.errors import UserError
from scaling.models import MODELS
from scaling.objectives import OBJECTIVES
from tests.data.test_video_folder import write_video
from tests.latents import write_latents

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/tiny_dit.py")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rat=1e-3", r"optimizer\.learning_rat: .*did you mean optimizer\.learning_rate"),
        ("optimiser.clip=1", r"optimiser\.clip: no such key"),
        ("train.seed=hello", r"train\.seed='hello': must be an integer"),
        ("train.seed=1.5", r"train\.seed=1\.5: must be an integer"),
        ("train.seed=-1", r"train\.seed=-1: must be in"),
        ("optimizer.learning_rate=0", r"optimizer\.learning_rate=0\.0: must be greater than 0"),
        ("optimizer.ema=(1.5,)", r"optimizer\.ema=\(1\.5,\): must be decays in"),
        ("optimizer.name=adam", r"optimizer\.name='adam': must be one of adamw, sgd"),
        (
            "optimizer.schedule=step",
            r"optimizer\.drops=\(\): must be durations with schedule='step', else none",
        ),
        (
            "optimizer.drops=('3 steps',)",
            r"optimizer\.drops=\('3 steps',\): must be durations with schedule=",
        ),
        ("optimizer.floor=0.1", r"optimizer\.floor=0\.1: must be 0 but with schedule='cosine'"),
        ("optimizer.layer_decay=0", r"optimizer\.layer_decay=0\.0: must be in \(0, 1\]"),
        ("optimizer.decay=l1", r"optimizer\.decay='l1': must be one of decoupled, l2"),
        ("train.duration=10 weeks", r"train\.duration='10 weeks': must be like"),
        ("train.duration=50 %", r"train\.duration='50 %': must be in steps, examples or epochs"),
        ("mesh.fsdp=0", r"mesh\.fsdp=0: must be at least 1"),
        ("model.block=adaln-one", r"model\.block='adaln-one': must be one of in-context"),
        ("model.depth=two", r"model\.depth='two': must be an integer"),
        ("objective.label_dropout=2.0", r"objective\.label_dropout=2\.0: must be in"),
        ("data.name=mnits", r"data\.name='mnits'"),
        ("sampling.steps=0", r"sampling\.steps=0: must be at least 1"),
    ],
)
def test_bad_value_is_one_line_that_names_the_key(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        build.build(config.load(TINY, [override]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.patch=3"], r"patch=3"),
        (["model.heads=3"], r"heads=3"),
        (["data.batch_size=20"], r"data\.batch_size=20: must be a multiple of .* 8"),
        (["mesh.data=3"], r"mesh\.data=3.*multiply to the 8 devices"),
        (["mesh.fsdp=3"], r"mesh\.fsdp=3.*multiply to the 8 devices"),
        (["model.learn_sigma=True"], r"objective\.learn_sigma=True"),
        (["model.variant=Q/4"], r"variant='Q/4'"),
        (["optimizer.layer_decay=0.5"], r"optimizer\.layer_decay: .* not that of \w+"),
        (["train.duration=1 examples"], r"train\.duration='1 examples': is less than one step"),
    ],
)
def test_what_does_not_fit_together_is_found_before_compilation(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        built = build.build(config.load(TINY, overrides))
        assert built.steps and built.place()
    assert "\n" not in str(error.value)


def test_missing_file_and_sections(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file"):
        config.load(str(tmp_path / "none.py"))
    empty = tmp_path / "empty.py"
    empty.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()\n")
    with pytest.raises(UserError, match=r"model: the config has no such section"):
        config.load(str(empty))


def test_durations() -> None:
    args = ("key", 64, 4000, 800)
    assert config.duration("800 steps", *args) == 800
    assert config.duration("6400 examples", *args) == 100
    assert config.duration("2 epochs", *args) == 125
    assert config.duration("5 %", *args) == 40
    for text in ("800", "1 step 2 epochs", "-1 steps", "", "1..5 epochs"):
        with pytest.raises(UserError, match="key="):
            config.duration(text, *args)


def test_overrides_reach_the_run() -> None:
    overrides = [
        "optimizer.ema=(0.5, 0.75)",
        "train.duration=3 epochs",
        "model.qk_norm=True",
        "optimizer.clip=None",
    ]
    cfg = config.load(TINY, overrides)
    assert cfg.optimizer.ema == (0.5, 0.75) and cfg.optimizer.clip is None
    assert cfg.train.duration == "3 epochs"
    assert build.build(cfg).model.qk_norm is True
    assert config.load(TINY, {"train.seed": 7}).train.seed == 7


def test_a_config_survives_json() -> None:
    import json

    cfg = config.load(TINY, ["optimizer.ema=(0.5,)"])
    again = config.from_dict(json.loads(json.dumps(cfg.raw)))
    assert dataclasses.replace(again, raw={}) == dataclasses.replace(cfg, raw={})


def write_pairs(folder: Path, package: Path) -> None:
    """1,100 pairs (32 epochs are one step of CLIP), and a package with a vocabulary of its form."""
    (folder / "train").mkdir(parents=True)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(folder / "train" / "0.tar", "w") as shard:
        for i in range(1100):
            for name, content in ((f"{i}.png", image.getvalue()), (f"{i}.txt", b"a number")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nnumber\n")
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"#version\nn u\n"))


def files() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", files())
def test_every_config_builds_and_takes_a_step(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Abstractly: the whole step is traced, with its sharded state, and nothing is allocated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_pairs(tmp_path / "pairs", tmp_path / "open_clip")
    write_latents(tmp_path / "runs/mnist_latents", shape=(7, 7, 4))
    write_latents(tmp_path / "runs/imagenet256", shape=(32, 32, 4), held_out="validation")
    for name in ("jump", "run"):
        write_video(tmp_path / "kinetics400/train" / name / "0.mp4", frames=63)
    with tfds.testing.mock_data(num_examples=64):
        built = build.build(config.load(str(ROOT / path)))
    like = state.abstract(built)
    if not built.config.trains:
        assert jax.tree.leaves(like.params) and not jax.tree.leaves(like.ema)
        return
    step = state.make_step(built)
    scalars = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in state.scalars(built).items()}
    after, metrics = jax.eval_shape(step, like, built.batch(built.config.data.batch_size), scalars)
    assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(lambda a: a.shape, like)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    "model",
    ["factorised-encoder", "factorised-self-attention", "factorised-dot-product", "divided", "short"],
)
def test_every_video_model_builds(model: str) -> None:
    built = build.build(config.load(str(ROOT / f"configs/mnist_vivit.py:{model}")))
    assert built.info.num_classes == built.model.num_classes == 80
    assert built.model.frames == built.info.image_shape[0]


def _attributes_read() -> set[str]:
    """Every name that the package reads as `something.name` or getattr(something, "name")."""
    names: set[str] = set()
    for file in (ROOT / "scaling").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
                names |= set(re.findall(r"'(\w+)'", ast.unparse(node)))
    return names


def test_every_config_key_is_read_by_something() -> None:
    sections = [*config._sections().values(), *OBJECTIVES.values(), *EVALUATORS.values()]
    sections += [family.MODULE for family in MODELS.values()]
    read = _attributes_read()
    keys = {f"{cls.__name__}.{f.name}" for cls in sections for f in dataclasses.fields(cls)}
    unread = {key for key in keys if key.split(".")[1] not in read} - {"DiT.parent", "ViT.parent"}
    assert not unread
