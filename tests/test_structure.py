"""The structure of the source: rooms on floors, doors, and what a command imports before it does anything."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room is a module or a package of prefix_ds; it may import rooms of strictly lower floors, and itself.
FLOORS = [
    {"__init__", "errors"},
    {"faults"},
    {"config", "devices", "dist", "files", "progress", "promise", "verdicts"},
    {"prefix", "int8", "data", "optim", "checkpoint", "tracking", "scores", "stop", "new_tokenizer"},
    {"model", "loading", "logs", "run_folder"},
    {"card", "engine", "initial", "merging", "result", "rows", "speed"},
    {"loop", "memory", "opening", "export", "plan"},
    {"writing", "suitability"},
    {"evaluation"},
    {"train", "evaluate", "generate", "check", "init", "importing", "exporting", "links", "compare"},
    {"demo", "served"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Packages that only some rooms may know.
DOORS = {
    "deepspeed": {"engine"},
    "mlflow": {"tracking", "served"},
    "peft": set(),
    "bitsandbytes": {"int8"},
    "transformers": {"int8", "model", "loading", "engine", "new_tokenizer", "logs", "plan"},
    "datasets": {"data", "logs"},
    "jinja2": {"compare"},
    "matplotlib": set(),
    "rouge_score": {"scores"},
    "sacrebleu": {"scores"},
}
TORCH_FREE = {"__init__", "errors", "config", "files", "progress", "cli", "__main__", "run_folder", "init"}
TORCH_FREE |= {"compare", "scores", "tracking", "verdicts"}


def modules():
    return sorted((ROOT / "prefix_ds").rglob("*.py"))


def room_of(path):
    return path.relative_to(ROOT / "prefix_ds").parts[0].removesuffix(".py")


def imports(path):
    """Full names of everything a module imports anywhere, lazily too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "prefix_ds":
            yield parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else "__init__"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_to_a_lower_floor(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} is on no floor: name it in FLOORS"
    for other in rooms_imported(path):
        assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_some_rooms_know_a_package(path):
    room, packages = room_of(path), {name.split(".")[0] for name in imports(path)}
    for package, rooms in DOORS.items():
        assert package not in packages or room in rooms, f"{room} imports {package}"
    if room in TORCH_FREE:
        assert "torch" not in packages
    if room != "dist":
        assert "os.environ" not in path.read_text(encoding="utf-8"), f"{room} reads the environment"


def test_every_room_is_there():
    assert {room_of(path) for path in modules()} == set(FLOOR_OF)


def test_every_module_says_what_it_does():
    silent = [str(path) for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_launcher_and_product_do_not_know_each_other():
    for path in modules():
        assert not any(name.split(".")[0] == "launcher" for name in imports(path))


def launcher_modules():
    return sorted((ROOT / "launcher").rglob("*.py"))


@pytest.mark.parametrize("path", launcher_modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_launcher_needs_nothing_heavy_and_of_the_product_two_rooms(path):
    allowed = sys.stdlib_module_names | {"launcher", "yaml", "typer", "rich", "psutil"}
    for name in imports(path):
        package, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        is_ours = package == "prefix_ds" and room in {"config", "errors"}
        assert is_ours or package in allowed, f"{path}: imports {name}"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["compare", "--help"]])
def test_help_loads_nothing_heavy(words):
    heavy = ("torch", "deepspeed", "transformers", "datasets", "mlflow", "numpy")
    program = (
        "import sys; from prefix_ds.cli import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        f"print('LOADED', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "LOADED []", done.stdout
