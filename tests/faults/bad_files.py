"""Bad files of Python and JSON: configs, studies, and what run folders and studies hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[[Path], Any]

CONFIG_TEXTS: dict[str, bytes] = {
    "empty": b"", "syntax": b"def get_config(:\n", "indent": b"def get_config():\nreturn 3\n",
    "null": b"x = 1\0", "binary": bytes(range(128, 256)), "latin": "é = 'é'".encode("latin-1"),
    "no module": b"import nothing_such\n", "no name": b"from scaling import nothing_such\n",
    "raises": b"1 / 0\n", "exits": b"import sys\nsys.exit(3)\n", "exits well": b"raise SystemExit\n",
    "get_config raises": b"def get_config():\n    return {}['x']\n",
    "get_config exits": b"def get_config():\n    raise SystemExit(0)\n",
    "get_config of two": b"def get_config(a, b):\n    pass\n", "get_config is 3": b"get_config = 3\n",
    "recursion": b"def get_config():\n    return get_config()\n",
    "returns None": b"def get_config():\n    pass\n", "returns dict": b"def get_config():\n    return {}\n",
    "returns class": b"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict\n",
}  # fmt: skip
SECTIONS: dict[str, str] = {
    "nothing": "dict()",
    "model 3": "dict(model=3)",
    "no objective": "dict(model=dict(name='vit'))",
    "model None": "dict(model=None, objective=None)",
    "data list": "dict(ok, data=[1])",
    "evaluators list": "dict(ok, evaluators=[1])",
    "evaluator 3": "dict(ok, evaluators=dict(val=3))",
    "evaluator nameless": "dict(ok, evaluators=dict(val=dict()))",
    "evaluator unknown": "dict(ok, evaluators=dict(val=dict(name='nothing')))",
    "evaluator key": "dict(ok, evaluators=dict(val=dict(name='metrics', nothing=3)))",
    "name list": "dict(ok, model=dict(name=['vit'], variant='A/4'))",
    "section": "dict(ok, nothing=dict(a=1))",
    "variant None": "dict(ok, model=dict(name='vit'))",
    "helpers 3": "dict(ok, helpers=3)",
    "nan": "dict(ok, optimizer=dict(learning_rate=float('nan')))",
    "function": "dict(ok, optimizer=dict(learning_rate=print))",
    "huge": "dict(ok, train=dict(seed=10**30))",
    "inf list": "dict(ok, optimizer=dict(ema_decays=(1e999,)))",
    "former": "dict(ok, optimizer=dict(clip=3.0))",
    "section None": "dict(ok, train=None)",
    "helper empty": "dict(ok, helpers=dict(a=''))",
    "number key": "dict(ok, train={1: 2})",
    "text None": "dict(ok, data=dict(name='digits', text=None))",
    "text 3": "dict(ok, data=dict(name='digits', text=3))",
}
OK = (
    "dict(model=dict(name='vit', variant='A/4'), objective=dict(name='classification'), "
    "data=dict(name='digits'))"
)


def text_file(name: str, content: bytes) -> Write:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


def bad_configs() -> dict[str, Write]:
    """Returns functions that write a config into a folder and return its path, by what is wrong with it."""
    head = "from ml_collections import ConfigDict\nok = " + OK + "\ndef get_config():\n    return ConfigDict("
    writes = {name: text_file("c.py", content) for name, content in CONFIG_TEXTS.items()}
    writes |= {f"section {k}": text_file("c.py", f"{head}{v})\n".encode()) for k, v in SECTIONS.items()}
    writes |= {
        "a folder": lambda folder: str(folder),
        "missing": lambda folder: str(folder / "none.py"),
        "json": text_file("c.json", b"{}"),
        "no suffix": text_file("c", b"x = 1\n"),
        "variant": _variant,
    }
    return writes


def _variant(folder: Path) -> str:
    (folder / "c.py").write_text("def get_config():\n    pass\n")
    return f"{folder / 'c.py'}:B/4"


def bad_studies(config: str) -> dict[str, Write]:
    """Returns study files by what is wrong with them."""
    head = "from scaling.study.sweep import Study, product\n"
    fields = {
        "name": "'s'",
        "config": repr(config),
        "sweep": "product({'train.seed': [0]})",
        "metric": "'val_top1'",
    }
    changes: dict[str, dict[str, str]] = {
        "metric": {"metric": "'val_nothing'"},
        "metric number": {"metric": "3"},
        "sweep 3": {"sweep": "3"},
        "sweep empty": {"sweep": "[]"},
        "sweep of lists": {"sweep": "[[1]]"},
        "sweep text": {"sweep": "'abc'"},
        "config none": {"config": "'nothing.py'"},
        "config 3": {"config": "3"},
        "name": {"name": "'a b'"},
        "name number": {"name": "3"},
        "key": {"sweep": "product({'train.sed': [0]})"},
        "seed": {"sweep": "product({'train.seed': [-1]})"},
        "nan": {"sweep": "[{'optimizer.b1': float('nan')}]"},
        "twice": {"sweep": "[{}, {}]"},
        "value": {"sweep": "[{'train.seed': [1]}]"},
        "number as key": {"sweep": "[{3: 1}]"},
        "set": {"sweep": "product({'train.seed': {0, 1}})"},
        "title": {"title": "3"},
        "metric unknown": {"metric": "'no_such_kind'"},
        "tolerance": {"tolerance": "'wide'"},
        "tolerance 3": {"tolerance": "3"},
        "no field": {"nothing": "3"},
    }
    writes = {name: text_file("study.py", content) for name, content in CONFIG_TEXTS.items()}
    for name, change in changes.items():
        text = ", ".join(f"{key}={value}" for key, value in {**fields, **change}.items())
        writes[name] = text_file("study.py", f"{head}STUDY = Study({text})\n".encode())
    writes |= {
        "missing": lambda folder: str(folder / "none"),
        "STUDY 3": text_file("study.py", b"STUDY = 3\n"),
    }
    return writes


# --- JSON ---

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "number": b"3",
    "list": b"[1]",
    "text": b'"x"',
    "cut": b'{"a": ',
    "no UTF-8": b"\xff\xfe{\x81}",
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "no keys": b"{}",
    "NaN": b'{"config": NaN, "status": NaN, "runs": NaN, "splits": NaN, "data": NaN}',
    "lists": b'{"config": [1], "status": [1], "runs": [1], "splits": [1], "data": [1]}',
    "nested": b'{"config": {"model": [1]}, "status": {"a": 1}, "runs": {"a": [1]}, "splits": {"train": 3}}',
    "nulls": b'{"config": {"model": null}, "status": null, "runs": {"a": null}, "splits": null}',
    "zeros": b"\0" * 4096,
}


def bad_jsons(name: str) -> dict[str, Write]:
    """Returns what writes the file `name` into a folder, by what is wrong with it."""

    def write(content: bytes) -> Write:
        return lambda folder: (folder / name).write_bytes(content)

    def folder_instead(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return {**{key: write(content) for key, content in TEXTS.items()}, "a folder": folder_instead}
