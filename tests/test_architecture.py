"""Imports go down the floors; sideways only to the two bases. Files and functions keep to their budgets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_gdc"
FLOORS = [
    [
        "custom_generate",
        "adversarial.losses",
        "images.augmentation",
        "intervals",
        "dense",
        "kv_cache",
        "divergences",
        "incremental",
        "moments",
        "objectives",
        "partition",
        "schedules",
        "scoring",
        "stories",
        "muon",
        "onnx_export",
        "trl_compat",
        "models",
    ],
    [
        "adversarial",
        "images",
        "arguments",
        "actors",
        "adapters",
        "vocabularies",
        "chains",
        "checkpoints",
        "critics",
        "data",
        "encoding",
        "evaluation",
        "features",
        "frozen",
        "generation_scores",
        "hub",
        "classifier_training",
        "loading",
        "metrics",
    ]
    + [
        "acceptance",
        "adapters",
        "pools",
        "proposals",
        "certificates",
        "moment_window",
        "ready_features",
        "ppo_arguments",
        "pretrain_arguments",
        "preferences",
        "prompt_order",
        "reporting",
        "rollouts",
        "sampling",
        "scorers",
        "searching",
        "target_files",
        "reward_models",
        "text_models",
        "story_tasks",
        "task_scores",
        "tasks",
        "text_scores",
        "tracking",
        "two_sample",
        "vllm_sampler",
    ],
    ["targets", "adversarial.demonstrations", "replay", "quasi_rejection", "images.sampling"],
    ["trainers"],
    ["cli", "commands"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SIDEWAYS = {"targets.base", "trainers.policy_gradient", "trainers.gdc", "trainers.adversarial", "trainers.pretraining"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def home(module: str) -> str:
    """The entry of FLOORS that a dotted module belongs to: itself, or else its folder."""
    return module if module in FLOOR else module.split(".")[0]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, as dotted names below it."""
    package = ["hf_gdc", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "hf_gdc":
                found |= {alias.name for alias in node.names}
            elif name.startswith("hf_gdc."):
                found.add(name.removeprefix("hf_gdc."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("hf_gdc.") for a in node.names if a.name.startswith("hf_gdc.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = dotted(path)
    for module in imported(path):
        mine, room = home(own), home(module)
        assert room in FLOOR, f"{module} is on no floor"
        same_folder = own.split(".")[0] == module.split(".")[0]
        if own.endswith("__init__") and same_folder or module in SIDEWAYS or mine == room == "models":
            continue
        if FLOOR[mine] == FLOOR[room] == 1:
            continue  # helpers of floor 1 may use each other, without cycles (below)
        assert FLOOR[room] < FLOOR[mine], f"{own} imports {module}"


def test_floor_1_has_no_cycles():
    graph = {dotted(path): imported(path) for path in FILES if FLOOR[home(dotted(path))] == 1}
    graph = {name: {m for m in uses if m in graph and m != name} for name, uses in graph.items()}
    while graph:
        leaves = {name for name, uses in graph.items() if not uses & set(graph)}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: uses for name, uses in graph.items() if name not in leaves}


def test_nothing_imports_recipes_and_every_module_has_a_floor():
    for path in FILES:
        assert "recipes" not in {m.split(".")[0] for m in imported(path)}
        assert home(dotted(path)) in FLOOR


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 360
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 65, f"{node.name}: {node.end_lineno - node.lineno} lines"


def test_importing_the_package_imports_nothing_heavy():
    code = "import hf_gdc, sys; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "first", ["import hf_gdc", "from transformers import Trainer; import hf_gdc", "from hf_gdc import SmallGPTConfig"]
)
def test_auto_classes_know_small_gpt_in_any_order(first):
    code = f"{first}; from transformers import AutoConfig; print(AutoConfig.for_model('small_gpt').model_type)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "small_gpt", done.stderr
