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
        "adversarial_losses",
        "intervals",
        "dense",
        "image_augmentation",
        "kv_cache",
        "divergences",
        "incremental",
        "moments",
        "objectives",
        "partition",
        "scoring",
        "stories",
        "muon",
        "onnx_export",
        "trl_compat",
        "models",
    ],
    [
        "arguments",
        "actors",
        "adapters",
        "discriminator_training",
        "energy_training",
        "game",
        "gan_arguments",
        "logit_networks",
        "real_text",
        "shared_networks",
        "token_credit",
        "vocabularies",
        "checkpoints",
        "critics",
        "data",
        "encoding",
        "evaluation",
        "features",
        "frozen",
        "hub",
        "classifier_training",
        "image_adversary",
        "image_arguments",
        "image_batches",
        "image_classifier",
        "image_data",
        "image_features",
        "image_grids",
        "image_players",
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
        "preferences",
        "prompt_order",
        "reporting",
        "rollouts",
        "sampling",
        "scorers",
        "target_files",
        "reward_models",
        "text_models",
        "text_scores",
        "vllm_sampler",
    ],
    ["targets", "demonstrations", "replay", "quasi_rejection", "image_sampling"],
    ["trainers"],
    ["cli", "commands"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SIDEWAYS = {"targets.base", "trainers.policy_gradient", "trainers.gdc", "trainers.adversarial"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


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
    own = path.relative_to(PACKAGE).with_suffix("").parts
    for module in imported(path):
        room = module.split(".")[0]
        assert room in FLOOR, f"{module} is on no floor"
        if (
            own[-1] == "__init__"
            and room == own[0]
            or module in SIDEWAYS
            or own[0] == room
            and room in ("models", "metrics")
        ):
            continue
        if FLOOR[own[0]] == FLOOR[room] == 1 and own[0] != room:
            continue  # helpers of floor 1 may use each other, without cycles (below)
        assert FLOOR[room] < FLOOR[own[0]], f"{'.'.join(own)} imports {module}"


def test_floor_1_has_no_cycles():
    graph = {name: set() for name in FLOORS[1]}
    for path in FILES:
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in graph:
            graph[room] |= {m.split(".")[0] for m in imported(path)} & set(graph) - {room}
    while graph:
        leaves = {name for name, uses in graph.items() if not uses & set(graph)}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: uses for name, uses in graph.items() if name not in leaves}


def test_nothing_imports_recipes_and_every_module_has_a_floor():
    for path in FILES:
        assert "recipes" not in {m.split(".")[0] for m in imported(path)}
        assert path.relative_to(PACKAGE).with_suffix("").parts[0] in FLOOR


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
