"""The rules that every file of the package keeps: CONTRIBUTING.md explains them."""

import ast
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
# Imports go down this list. Rooms on one line do not import each other.
ROOMS = (
    ("__main__", "worker"),
    ("cli",),
    ("law_verbs",),
    ("plan",),
    ("study",),
    ("convert",),
    ("training",),
    ("evaluators",),
    ("run",),
    ("parallel",),
    ("objectives",),
    ("sampling",),
    ("models", "data", "metrics", "laws"),
    ("diffusion", "flops", "former_names", "overrides", "preprocessing", "randomness", "validation"),
    ("files", "flag_types", "processes", "progress", "python_files", "streams"),
    ("errors",),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
LINES, FUNCTION = 400, 60
NO_BEGINNING = re.compile(r"(Of|What|Those|By)\b")
VERB = re.compile(r"(Is|[A-Z][a-z]*[^\Ws]s)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path) -> dict[str, ast.Module]:
    """Returns the package's modules by their dotted names, parsed."""
    found = {}
    for path in sorted((root / "scaling").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def imports(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Returns the modules that each imports anywhere: in functions and for type checkers alone, too."""

    def module_of(name: str) -> str:
        return name if name in modules else module_of(name.rpartition(".")[0])

    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scaling":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "scaling"]
            found[name] |= {module_of(each) for each in names} - {name}
    return found


def functions(tree: ast.Module) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def upward_imports(root: Path) -> list[str]:
    def level(module: str) -> tuple[int, str]:
        room = module.split(".")[1] if "." in module else "__version__"
        return LEVELS.get(room, len(ROOMS)), room

    faults = []
    for name, others in imports(sources(root)).items():
        for other in others:
            (mine, room), (below, there) = level(name), level(other)
            if room != there and mine >= below:
                faults.append(f"{name} imports {other}")
    return faults


def circles(root: Path) -> list[str]:
    try:
        TopologicalSorter(imports(sources(root))).prepare()
    except CycleError as e:
        return [" -> ".join(e.args[1])]
    return []


def long_files(root: Path) -> list[str]:
    files = [path for room in ("scaling", "tests") for path in (root / room).rglob("*.py")]
    lines = {path: len(path.read_text().splitlines()) for path in files}
    return [f"{path.relative_to(root)}: {count} lines" for path, count in lines.items() if count > LINES]


def long_functions(root: Path) -> list[str]:
    return [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, tree in sources(root).items()
        for node in functions(tree)
        if node.end_lineno is not None and node.end_lineno - node.lineno >= FUNCTION
    ]


def raises_itself(node: ast.AST) -> bool:
    """Returns whether a function has a `raise` of its own, which names what it raises."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda | ast.ClassDef):
            continue
        if (isinstance(child, ast.Raise) and child.exc is not None) or raises_itself(child):
            return True
    return False


def unsaid_errors(root: Path) -> list[str]:
    """Public functions that raise and do not say so, and any that says it in another form than Google's."""
    faults = []
    for name, tree in sources(root).items():
        for node in functions(tree):
            said = ast.get_docstring(node) or ""
            form = re.search(r"^Raises:\n    \w+: ", said, re.M)
            if (not node.name.startswith("_") and raises_itself(node) and not form) or (
                re.search(r"\b[Rr]aises:? +(a |an )?[A-Z]\w*(Error|Finite|Interrupted)\b", said)
                or (re.search(r"^Raises:", said, re.M) and not form)
            ):
                faults.append(f"{name}.{node.name}")
    return faults


def is_property(node: Function) -> bool:
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(name.split(".")[-1] in ("property", "cached_property") for name in names)


def docstrings_without_a_verb(root: Path) -> list[str]:
    """Functions whose docstring does not begin with a verb in the third person, and beginnings to avoid."""
    faults = []
    for name, tree in sources(root).items():
        for node in ast.walk(tree):
            if not isinstance(node, Function | ast.ClassDef | ast.Module):
                continue
            said = ast.get_docstring(node) or ""
            verbless = isinstance(node, Function) and said and not is_property(node) and not VERB.match(said)
            if verbless or NO_BEGINNING.match(said):
                faults.append(f"{name}.{getattr(node, 'name', '')}: {said.splitlines()[0]}")
    return faults


CHECKS: dict[Callable[[Path], list[str]], tuple[dict[str, str], str]] = {
    # check -> (a house that breaks the rule, what is said of it)
    upward_imports: (
        {"models/a.py": "def f():\n    from scaling.run import b\n", "run/b.py": ""},
        "scaling.models.a imports scaling.run.b",
    ),
    circles: (
        {
            "run/a.py": "from scaling.run import b",
            "run/b.py": """
                from typing import TYPE_CHECKING
                if TYPE_CHECKING:
                    from scaling.run.a import A
            """,
        },
        "scaling.run.a -> scaling.run.b -> scaling.run.a|scaling.run.b -> scaling.run.a -> scaling.run.b",
    ),
    long_files: ({"a.py": "\n" * 401}, "scaling/a.py: 401 lines"),
    long_functions: ({"a.py": "def f():\n" + "    pass\n" * 60}, "scaling.a.f: 61 lines"),
    unsaid_errors: (
        {
            "a.py": '''
                def said():
                    """Reads.

                    Raises:
                        ValueError: always.
                    """
                    raise ValueError

                def unsaid():
                    raise ValueError

                def _of_the_house():
                    raise ValueError
            '''
        },
        "scaling.a.unsaid",
    ),
    docstrings_without_a_verb: (
        {
            "a.py": '''
                """A module."""

                class A:
                    """The noun that it is."""

                    @property
                    def size(self):
                        """Bytes."""

                    def read(self):
                        """Reads."""

                    def write(self):
                        """Of a file, writes."""
            '''
        },
        "scaling.a.write: Of a file, writes.",
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps(check: Callable[[Path], list[str]]) -> None:
    assert len(sources(ROOT)) > 100
    assert check(ROOT) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_house_that_does_not_keep(check: Callable[[Path], list[str]], tmp_path: Path) -> None:
    files, said = CHECKS[check]
    for name, text in files.items():
        (tmp_path / "scaling" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scaling" / name).write_text(dedent(text))
    assert check(tmp_path) and check(tmp_path)[0] in said.split("|") and len(check(tmp_path)) == 1


@pytest.mark.parametrize("text", ["Raises UserError where it is not.", "Raises: UserError, where it is not."])
def test_one_form_of_raises(text: str, tmp_path: Path) -> None:
    (tmp_path / "scaling").mkdir()
    (tmp_path / "scaling/a.py").write_text(f'def f():\n    """Reads. {text}"""\n')
    assert unsaid_errors(tmp_path) == ["scaling.a.f"]


def test_every_room_is_in_the_list() -> None:
    names = {path.stem for path in (ROOT / "scaling").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__init__", "__pycache__"} == LEVELS.keys()
