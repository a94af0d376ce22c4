"""Configs: every key is checked before anything is compiled, and every key is read by something."""

import ast
import dataclasses
import gzip
import inspect
import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from scaling import data, former_names, objectives
from scaling.data.sources import openmoji
from scaling.errors import UserError
from scaling.evaluators import EVALUATORS
from scaling.models import MODELS
from scaling.objectives import OBJECTIVES
from scaling.parallel.mesh import AXES
from scaling.preprocessing import Preprocessing
from scaling.run import build, state
from scaling.run import config as run_config
from scaling.run.options import Checkpoint, Optimizer, ParamRule, Train, duration
from scaling.sampling import Sampling
from scaling.training import config
from tests.support.latents import write_latents
from tests.support.videos import write_video

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/support/tiny_dit.py")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rat=1e-3", r"optimizer\.learning_rat: .*did you mean optimizer\.learning_rate"),
        ("optimiser.clip=1", r"optimiser\.clip: no such key"),
        ("train.seed=hello", r"train\.seed='hello': must be an integer"),
        ("train.seed=1.5", r"train\.seed=1\.5: must be an integer"),
        ("train.seed=-1", r"train\.seed=-1: must be in"),
        ("optimizer.learning_rate=0", r"optimizer\.learning_rate=0\.0: must be greater than 0"),
        ("optimizer.ema_decays=(1.5,)", r"optimizer\.ema_decays=\(1\.5,\): must be decays in"),
        ("optimizer.name=adam", r"optimizer\.name='adam': must be one of adamw, sgd"),
        (
            "optimizer.schedule=step",
            r"optimizer\.lr_milestones=\(\): must be durations with schedule='step', else none",
        ),
        (
            "optimizer.lr_milestones=('3 steps',)",
            r"optimizer\.lr_milestones=\('3 steps',\): must be durations with schedule=",
        ),
        (
            "optimizer.final_lr_ratio=0.1",
            r"optimizer\.final_lr_ratio=0\.1: must be 0 but with schedule='cosine'",
        ),
        ("optimizer.layer_decay=0", r"optimizer\.layer_decay=0\.0: must be in \(0, 1\]"),
        (
            "optimizer.weight_decay_mode=l1",
            r"optimizer\.weight_decay_mode='l1': must be one of decoupled, l2",
        ),
        (
            "optimizer.param_rules=[{'match': '('}]",
            r"^optimizer\.param_rules\[0\]\.match='\(': is not a regular expression",
        ),
        (
            "optimizer.param_rules=[{'match': '^a'}, {'frozen': True}]",
            r"^optimizer\.param_rules\[1\]\.match='': must be a regular expression, or '' with a role",
        ),
        (
            "optimizer.param_rules=[{'match': '^a', 'lr_scal': 0.1}]",
            r"^optimizer\.param_rules\[0\]\.lr_scal: no such key; did you mean \S+\.lr_scale\?",
        ),
        (
            "optimizer.param_rules=[{'match': '^a', 'optimizer': 'lion'}]",
            r"^optimizer\.param_rules\[0\]\.optimizer='lion': must be one of adamw, sgd, muon or None",
        ),
        (
            "optimizer.param_rules=(('^a', 1.0, 0.0, False),)",
            r"^optimizer\.param_rules\[0\]=\('\^a'.*\): must be a dict of match, role, lr_scale, ",
        ),
        ("train.duration=10 weeks", r"train\.duration='10 weeks': must be like"),
        ("train.duration=50 %", r"train\.duration='50 %': must be in steps, examples or epochs"),
        ("mesh.fsdp=0", r"mesh\.fsdp=0: must be at least 1"),
        ("model.block=adaln-one", r"model\.block='adaln-one': must be one of in-context"),
        ("model.depth=two", r"model\.depth='two': must be an integer"),
        ("objective.condition_dropout=2.0", r"objective\.condition_dropout=2\.0: must be in"),
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
        (["model.learn_sigma=True"], r"model\.learn_sigma=True"),
        (["model.variant=Q/4"], r"^model\.variant='Q/4': must be SIZE/PATCH"),
        (["optimizer.layer_decay=0.5"], r"optimizer\.layer_decay: .* not that of \w+"),
        (["train.duration=1 examples"], r"train\.duration='1 examples': is less than one step"),
    ],
)
def test_what_does_not_fit_together_is_found_before_compilation(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        run = build.build(config.load(TINY, overrides))
        assert run.steps and run.batch_sharding()
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
    assert duration("800 steps", *args) == 800
    assert duration("6400 examples", *args) == 100
    assert duration("2 epochs", *args) == 125
    assert duration("5 %", *args) == 40
    for text in ("800", "1 step 2 epochs", "-1 steps", "", "1..5 epochs"):
        with pytest.raises(UserError, match="key="):
            duration(text, *args)


def test_overrides_reach_the_run() -> None:
    overrides = [
        "optimizer.ema_decays=(0.5, 0.75)",
        "train.duration=3 epochs",
        "model.qk_norm=True",
        "optimizer.grad_clip_norm=None",
    ]
    cfg = config.load(TINY, overrides)
    assert cfg.optimizer.ema_decays == (0.5, 0.75) and cfg.optimizer.grad_clip_norm is None
    assert cfg.train.duration == "3 epochs"
    assert build.build(cfg).model.qk_norm is True
    assert config.load(TINY, {"train.seed": 7}).train.seed == 7


def test_a_config_survives_json() -> None:
    import json

    cfg = config.load(TINY, ["optimizer.ema_decays=(0.5,)"])
    again = run_config.from_dict(json.loads(json.dumps(cfg.raw)))
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
    # Blank drawings, which are not kept for other tests: rendering them takes seconds.
    monkeypatch.setattr(openmoji, "_draw", lambda path, size: np.zeros((size, size, 3), np.uint8))
    monkeypatch.setattr(openmoji, "_draw_splits", openmoji._draw_splits.__wrapped__)
    with tfds.testing.mock_data(num_examples=64):
        run = build.build(config.load(str(ROOT / path)))
    like = state.abstract(run)
    if not objectives.trains(run.config.objective.name):
        assert jax.tree.leaves(like.params) and not jax.tree.leaves(like.ema)
        return
    step = state.make_step(run)
    traced_hparams = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in state.traced_hparams(run).items()}
    after, metrics = jax.eval_shape(step, like, run.batch(run.config.data.batch_size), traced_hparams)
    assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(lambda a: a.shape, like)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    "model",
    ["factorised-encoder", "factorised-self-attention", "factorised-dot-product", "divided", "short"],
)
def test_every_video_model_builds(model: str) -> None:
    run = build.build(config.load(str(ROOT / f"configs/mnist_vivit.py:{model}")))
    assert run.info.num_classes == run.model.num_classes == 80
    assert run.model.frames == run.info.image_shape[0]


# What objects of a section are called where their fields are read; within its own file it is `self`.
HOLDERS: dict[Any, set[str]] = {
    data.Data: {"data", "images", "own"},
    Optimizer: {"options", "optimizer"},
    ParamRule: {"rule"},
    Train: {"train"},
    Checkpoint: {"checkpoint"},
    Sampling: {"options", "sampling"},
    Preprocessing: {"preprocessing"},
    **{evaluator: {"evaluator"} for evaluator in EVALUATORS.values()},
    **{family.module: {"model"} for family in MODELS.values()},
}


def _reads() -> set[tuple[Path, str, str]]:
    """(file, name of the object, attribute) of every read in the package but those of `__post_init__`."""
    found = set()
    for file in (ROOT / "scaling").rglob("*.py"):
        tree = ast.parse(file.read_text())
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
        skipped = {id(node) for check in checks for node in ast.walk(check)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in skipped:
                found.add((file, ast.unparse(node.value).rpartition(".")[2], node.attr))
    return found


def unread(classes: Iterable[Any], reads: set[tuple[Path, str, str]]) -> list[str]:
    """The fields that nothing reads from an object that can be of their class."""
    keys = []
    for cls in classes:
        own = {Path(inspect.getfile(each)) for each in cls.__mro__ if each.__module__.startswith("scaling")}
        holders = HOLDERS.get(cls, set())
        read = {key for file, name, key in reads if name in holders or (name == "self" and file in own)}
        keys += [f"{cls.__name__}.{f.name}" for f in dataclasses.fields(cls) if f.name not in read]
    return keys


def test_every_config_key_is_read_by_something() -> None:
    sections = [*run_config.SECTIONS.values(), ParamRule, *OBJECTIVES.values(), *EVALUATORS.values()]
    models = [family.module for family in MODELS.values()]
    flax_own = {f"{cls.__name__}.{name}" for cls in models for name in ("parent", "name")}
    whole = {f"Mesh.{axis}" for axis in AXES}  # read together, by dataclasses.asdict
    assert set(unread([*sections, *models], _reads())) - flax_own - whole == set()


def test_a_key_with_a_common_name_that_nothing_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class More:
        seed: int
        step: int  # which is read of many objects, and not of this one

    monkeypatch.setitem(HOLDERS, More, {"train"})
    assert unread([More], _reads()) == ["More.step"]


FORMER = {
    "evaluate.val.every": "evaluators.val.every",
    "evaluate.val.kind": "evaluators.val.name",
    "evaluate.v.temporal": "evaluators.v.num_clips",
    "evaluate.linear-8.c": "evaluators.linear-8.inverse_l2",
    "evaluate.fd.sampling.clip": "evaluators.fd.sampling.clip_denoised",
    "evaluate.z.data.augment": "evaluators.z.data.train_transforms",
    "model.family": "model.name",
    "optimizer.clip": "optimizer.grad_clip_norm",
    "optimizer.drops": "optimizer.lr_milestones",
    "optimizer.floor": "optimizer.final_lr_ratio",
    "optimizer.decay": "optimizer.weight_decay_mode",
    "optimizer.ema": "optimizer.ema_decays",
    "optimizer.rules": "optimizer.param_rules",
    "sampling.guidance": "sampling.guidance_scale",
    "data.text.too_long": "data.text.overflow",
    "objective.label_dropout": "objective.condition_dropout",
    "train.start": "train.init_from",
    "train.start_only": "train.init_only",
}


@pytest.mark.parametrize(("old", "new"), FORMER.items())
def test_an_old_key_answers_with_the_new_ones_name(old: str, new: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(old)}: is now called {re.escape(new)}$"):
        config.load(TINY, {old: 1})
    with pytest.raises(UserError, match=rf"^{re.escape(old)}: is now called {re.escape(new)}$"):
        run_config.complete(_nested(old, 1))


def test_keys_of_today_have_no_other_name() -> None:
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem != "pretrained":
            keys = run_config.flat(config.load_dict(str(path)))
            assert [key for key in keys if former_names.current_key(key) != key] == []


def test_an_older_runs_config_is_read_in_todays_words() -> None:
    older: dict[str, Any] = {}
    for i, old in enumerate(FORMER):
        older = run_config.merged(older, _nested(old, i))
    renamed = run_config.flat(former_names.renamed(older))
    assert renamed == {new: i for i, new in enumerate(FORMER.values())}


def test_an_older_runs_rules_have_names() -> None:
    """They equal what today's configs give, so that the run is resumed."""
    rules = [["(bias|scale)$", 1.0, 0.0, False], ["^image/", 0.1, None, True]]
    named = [
        {"match": "(bias|scale)$", "weight_decay": 0.0},
        {"match": "^image/", "lr_scale": 0.1, "frozen": True},
    ]
    assert former_names.renamed({"optimizer": {"rules": rules}}) == {"optimizer": {"param_rules": named}}
    assert former_names.renamed({"optimizer.rules": rules}) == {"optimizer.param_rules": named}
    default = [[r"(bias|scale|positions|token|embedding)$", 1.0, 0.0, False]]
    older = config.load_dict(TINY)
    today = run_config.flat(older)
    del older["optimizer"]["param_rules"]
    older["optimizer"]["rules"] = default
    assert run_config.flat(run_config.stored({"config": older})) == today


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}
