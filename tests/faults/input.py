"""Bad input: what may be wrong with a verb's flags, configs, data, run folders and foreign checkpoints.

Each case gives a verb one bad thing, in this process, and wants one clear line. A few run the verb as a
process, which shows that its answer is the same.
"""

import argparse
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scaling import cli
from scaling.convert.files import SUMS
from scaling.overrides import flat
from tests.faults.bad_checkpoints import FOREIGN, foreign
from tests.faults.bad_data import bad_npz, bad_pairs, bad_videos, videos_to_train_on
from tests.faults.bad_files import Write, bad_configs, bad_jsons, bad_studies
from tests.faults.harness import ROOT, Case, Outcome, call_here, judge, run_verb, run_verb_here

SUPPORT = ROOT / "tests/support"
VIT, DIT, VILT = (str(SUPPORT / f"tiny_{name}.py") for name in ("vit", "dit", "vilt"))
SHORT = ["--config.train.duration=1 steps"]
CLIP = f"{ROOT}/configs/openmoji_clip.py:ViT-F/16"
VIDEOS = [  # every video of the training split is in the first batch
    f"--config={ROOT}/configs/mnist_vivit.py:joint", "--config.model.depth=1", "--config.data.image_size=14",
    "--config.data.train_transforms=['center_crop']", "--config.data.eval_transforms=['center_crop']",
    "--config.data.video.frames=4", "--config.data.batch_size=4", "--config.evaluators.val.batch_size=4",
]  # fmt: skip
SAMPLED = 12  # one of so many cases runs as a process, too
CONFIGS = (DIT, VIT, VILT, f"{ROOT}/configs/mnist_dit.py:F/7", CLIP, f"{ROOT}/configs/mnist_vivit.py:joint")


def cases() -> Iterator[Case]:
    """Yields the cases, cheap ones first."""
    yield from _flags()
    yield from _config_values()
    yield from _config_typos()
    yield from _files_of_python()
    yield from _data()
    yield from _run_folders()
    yield from _studies()
    yield from _foreign()


# --- flags ---

BY_TYPE: dict[str, tuple[str, ...]] = {
    "count": ("0", "-1", "nan", "1.5", "", "99999999999999999999", "abc", "2147483648", "[1]"),
    "from_zero": ("-1", "4294967296", "nan", "", "1e3", "99999999999999999999"),
    "amount": ("nan", "inf", "-inf", "-1", "", "abc", "1e999"),
    "path": ("", " ", "x" * 300, "a\0b"),
}
TEXTS = ("", "nothing/such", "\0", "x" * 300, "/", "-1", "é:\u2028")


def _parsers() -> dict[str, argparse.ArgumentParser]:
    actions = cli._parser()._actions
    choices: dict[str, argparse.ArgumentParser] = next(
        a.choices for a in actions if isinstance(a, argparse._SubParsersAction)
    )
    return choices


def _flags() -> Iterator[Case]:
    """Yields every flag of every verb with bad values of its type, the others being plausible."""
    for verb, parser in _parsers().items():
        actions = [a for a in parser._actions if a.dest != "help"]
        for action in actions:
            if action.nargs == 0:  # a switch takes no value
                values: tuple[str, ...] = ("=1",)
            else:
                values = BY_TYPE.get(getattr(action.type, "__name__", ""), TEXTS)
                values = ("nothing",) if action.choices else values
            for value in values:
                if action.dest == "reinit" and value in ("", "-1"):
                    continue
                words = [verb, *_others(actions, action), *_word(action, value)]
                yield _case(f"flag {verb} {action.dest} {value[:12]!r}", words)
        yield _case(f"flag {verb} unknown", [verb, *_others(actions, None), "--nothing=3"])
        yield _case(f"flag {verb} nothing else", [verb, "--nothing"])


def _word(action: argparse.Action, value: str) -> list[str]:
    if not action.option_strings:
        return ["--", value]
    return [action.option_strings[0] + (value if action.nargs == 0 else f"={value}")]


def _others(actions: list[argparse.Action], but: argparse.Action | None) -> list[str]:
    """Returns plausible values of the other arguments that a verb needs, none of which can be read."""
    known = {"config": VIT, "topology": "v5e:1x1", "format": "huggingface"}
    words: list[str] = []
    for action in actions:
        needed = action.required or (action.dest == "config" and but is not None and but.dest != "study")
        if action is but or not needed:
            continue
        value = known.get(action.dest, "/nowhere/at/all")
        words += [f"{action.option_strings[0]}={value}"] if action.option_strings else [value]
    return words


# --- keys of configs ---

WRONG: dict[type, tuple[str, ...]] = {
    bool: ("3", "'x'", "None", "[True]", "1e999"),
    int: ("1.5", "'x'", "[1]", "99999999999999999999", "-7", "1e999", "{'a': 1}", "True"),
    float: ("'x'", "[1]", "1e999", "-1e999", "-7.5", "{'a': 1}", "nan", "True"),
    str: ("3", "[1]", "None", "'nothing such'", "{}"),
    tuple: ("3", "{'a': 1}", "'x'", "[[[1]]]", "[1e999]"),
    type(None): ("{'a': 1}", "[[[1]]]", "1e999", "99999999999999999999", "-7"),
}
# Values that are no nonsense where most keys would not take them.
ALLOWED = {
    ("data.data_dir", "None"), ("data.builder", "None"), ("train.init_only", "'nothing such'"),
    ("evaluators.fd.classifier", "'nothing such'"),  # a folder to train it in
}  # fmt: skip


def _config_values() -> Iterator[Case]:
    """Yields every key of some configs with wrong types, NaN, negative and huge numbers, and other texts."""
    seen: set[str] = set()
    for config in CONFIGS:
        for key, value in flat(_loaded(config)).items():
            if key in seen or key.endswith(".data") or "param_rules" in key:
                continue
            seen.add(key)
            for bad in WRONG[type(value)]:
                if (key, bad) not in ALLOWED and not _same(key, value, bad):
                    yield _case(
                        f"value {key}={bad}", ["train", f"--config={config}", *SHORT, f"--config.{key}={bad}"]
                    )
    for bad in ("3", "[3]", "[{'match': 'x', 'nothing': 1}]", "[{'match': '('}]", "[{'match': 'no such'}]"):
        yield _case(
            f"value param_rules={bad}", ["train", f"--config={VIT}", f"--config.optimizer.param_rules={bad}"]
        )


def _same(key: str, value: Any, bad: str) -> bool:
    """Returns whether a value is none, in a key of a model that then has its variant's."""
    return bad == "None" and (not value or key.startswith("model."))


@functools.cache
def _loaded(config: str) -> dict[str, Any]:
    from scaling.training.config import load_dict

    return load_dict(config)


def _config_typos() -> Iterator[Case]:
    """Yields every key with a letter more or less, or in another section; the answer names the right one."""
    seen: set[str] = set()
    for config in (VIT, DIT):
        for key in flat(_loaded(config)):
            if key in seen:
                continue
            seen.add(key)
            section, _, name = key.rpartition(".")
            spoilt = [f"{section}.{name[:1]}{name}", f"{section}.{name}_", f"{section}x.{name}"]
            spoilt += [f"{section}.{name[:2]}{name[3:]}"] if len(name) > 4 else []
            for typo in spoilt:
                words = ["train", f"--config={config}", f"--config.{typo}=1"]
                yield Case(f"typo {typo}", functools.partial(_names, words, key))
    for name, key in (("lr", "optimizer.learning_rate"), ("optimizer.wd", "optimizer.weight_decay"),
                      ("train.epochs", "train.duration"), ("data.bs", "data.batch_size")):  # fmt: skip
        words = ["train", f"--config={VIT}", f"--config.{name}=1"]
        yield Case(f"other name {name}", functools.partial(_names, words, key))


def _names(words: list[str], key: str, folder: Path) -> Outcome:
    outcome = run_verb_here([*words, f"--workdir={folder / 'run'}"])
    if outcome.kind == "clear" and key not in outcome.detail:
        return Outcome("unclear", f"{key} is not named: {outcome.detail}")
    return outcome


# --- files of Python ---


def _files_of_python() -> Iterator[Case]:
    for name, write in bad_configs().items():
        yield Case(f"config {name}", functools.partial(_with_file, write, ["train"], "--config="))
    for name, write in bad_studies(VIT).items():
        yield Case(f"study {name}", functools.partial(_with_file, write, ["sweep"], ""))


def _with_file(write: Callable[[Path], str], words: list[str], flag: str, folder: Path) -> Outcome:
    return run_verb_here([*words, f"{flag}{write(folder)}", f"--workdir={folder / 'run'}"])


# --- data ---


def _data() -> Iterator[Case]:
    for name, write in bad_npz().items():
        yield Case(f"npz {name}", functools.partial(_with_data, write, [f"--config={VIT}"], "npz"))
    pairs = [
        f"--config={CLIP}", "--config.data.image_size=16", "--config.data.train_transforms=['center_crop']",
        "--config.data.eval_transforms=['center_crop']", "--config.data.text.vocab_size=600",
        "--config.data.batch_size=2", "--config.model.depth=1", "--config.model.text_depth=1",
    ]  # fmt: skip
    for name, write in bad_pairs().items():
        yield Case(f"pairs {name}", functools.partial(_with_data, write, pairs, "pairs"))
    for name, write in bad_videos().items():
        yield Case(f"videos {name}", functools.partial(_with_data, write, VIDEOS, "video_folder"))
    for name, (write, said) in videos_to_train_on().items():
        yield Case(
            f"videos {name}", functools.partial(_with_videos_to_train_on, write, said, "skipped" in name)
        )
    for name, write in bad_jsons("latents.json").items():
        yield Case(f"latents {name}", functools.partial(_with_latents, write))


def _with_data(write: Callable[[Path], Path], words: list[str], kind: str, folder: Path) -> Outcome:
    data = [f"--config.data.name={kind}", f"--config.data.data_dir={write(folder)}"]
    return run_verb_here(["train", *words, *SHORT, *data, f"--workdir={folder / 'run'}"])


def _with_videos_to_train_on(write: Write, said: str, skip: bool, folder: Path) -> Outcome:
    """Trains on what can be read of a set; what is left out of it must be said."""
    data = ["--config.data.name=video_folder", f"--config.data.data_dir={write(folder)}"]
    data += ["--config.data.unreadable=skip"] if skip else []
    code, _, answer = call_here(["train", *VIDEOS, *SHORT, *data, f"--workdir={folder / 'run'}"])
    outcome = judge(code, answer)
    return Outcome("fine", outcome.detail) if outcome.kind == "silent" and said in answer else outcome


def _with_latents(write: Callable[[Path], None], folder: Path) -> Outcome:
    from tests.support.latents import write_latents

    write_latents(folder / "latents")
    write(folder / "latents")
    data = ["--config.data.name=latents", f"--config.data.data_dir={folder / 'latents'}"]
    return run_verb_here(["train", f"--config={DIT}", *SHORT, *data, f"--workdir={folder / 'run'}"])


# --- run folders and studies ---


def _run_folders() -> Iterator[Case]:
    for name, write in bad_jsons("config.json").items():
        for verb in ("evaluate", "train", "sample", "export"):
            yield Case(f"run {verb} config.json {name}", functools.partial(_with_run, write, verb))
    for name, write in bad_jsons("status.json").items():
        yield Case(f"run train status.json {name}", functools.partial(_with_status, write))
    for name, write in bad_jsons("encoding.json").items():
        yield Case(f"encode {name}", functools.partial(_with_encoding, write))


@functools.cache
def _trained() -> Path:
    """Returns the folder of a run of one step, made once."""
    folder = Path(tempfile.mkdtemp(prefix="faults-run-")) / "run"
    assert cli.main(["train", f"--config={DIT}", *SHORT, f"--workdir={folder}"]) == 0
    return folder


def _with_run(write: Callable[[Path], None], verb: str, folder: Path) -> Outcome:
    run = folder / "run"
    shutil.copytree(_trained(), run)
    write(run)
    words = {
        "evaluate": ["evaluate", str(run)],
        "train": ["train", f"--config={DIT}", *SHORT, f"--workdir={run}"],
        "sample": ["sample", str(run), f"--out={folder / 'a.png'}", "--samples=8", "--batch-size=8"],
        "export": ["export", "--format=facebookresearch", str(run), f"--out={folder / 'out'}"],
    }
    return run_verb_here(words[verb])


def _with_status(write: Callable[[Path], None], folder: Path) -> Outcome:
    """Resumes a run whose status is no status: its checkpoints say where it is, and it is written again."""
    outcome = _with_run(write, "train", folder)
    again = outcome.kind == "silent" and "resumed at step 1" in outcome.detail
    return Outcome("fine", outcome.detail) if again else outcome


def _with_encoding(write: Callable[[Path], None], folder: Path) -> Outcome:
    (folder / "out").mkdir()
    write(folder / "out")
    return run_verb_here(["encode", str(_trained()), f"--config={VIT}", f"--out={folder / 'out'}"])


def _studies() -> Iterator[Case]:
    for name, write in bad_jsons("study.json").items():
        yield Case(f"study.json {name}", functools.partial(_with_study, write))


def _with_study(write: Callable[[Path], None], folder: Path) -> Outcome:
    (folder / "w" / "runs").mkdir(parents=True)
    write(folder / "w")
    return run_verb_here(["report", str(folder / "w")])


# --- foreign checkpoints ---


def _foreign() -> Iterator[Case]:
    for kind in FOREIGN:
        for name, spoil in foreign(kind).items():
            yield Case(f"foreign {kind} {name}", functools.partial(_with_foreign, kind, spoil))


@functools.cache
def _exported(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="faults-export-"))
    config, flags, name = FOREIGN[kind]
    words = [f"--config={SUPPORT / config}", *SHORT, *flags]
    assert cli.main(["train", *words, f"--workdir={folder / 'run'}"]) == 0
    assert cli.main(["export", f"--format={name}", str(folder / "run"), f"--out={folder / 'out'}"]) == 0
    return folder / "out"


def _with_foreign(kind: str, spoil: Callable[[Path], None], folder: Path) -> Outcome:
    config, flags, name = FOREIGN[kind]
    shutil.copytree(_exported(kind), folder / "source")
    (folder / "source" / SUMS).unlink()  # it would tell of any change, whatever that is
    spoil(folder / "source")
    words = ["import", f"--format={name}", f"--config={SUPPORT / config}", *flags]
    return run_verb_here([*words, str(folder / "source"), f"--out={folder / 'run'}"])


def _case(name: str, words: list[str]) -> Case:
    return Case(name, functools.partial(_refused, words))


def _refused(words: list[str], folder: Path) -> Outcome:
    """Runs a verb on bad words, and one in `SAMPLED` as a process, which must say the same."""
    if words[0] == "train" and not any(word.startswith("--workdir") for word in words):
        words = [*words, f"--workdir={folder / 'run'}"]
    here = run_verb_here(words, seconds=40)
    if (
        sum(map(ord, "".join(words))) % (SAMPLED * 20)
        or here.kind != "clear"
        or any("\0" in w for w in words)
    ):
        return here
    process = run_verb(words)
    same = process.detail == here.detail
    return here if same else Outcome("differs", f"{here.detail} | as a process: {process.detail}")
