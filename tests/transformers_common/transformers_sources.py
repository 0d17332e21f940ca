# SPDX-License-Identifier: Apache-2.0
"""transformers' own tests, from the source distribution of the installed version.

    python tests/transformers_common/transformers_sources.py      # fetches them into build/, which git ignores

The distribution holds the common mixins of tests, but not the modules of generation, export and pipeline tests that these
import. `common_tests` stands in empty ones, so what those would test is tested here by `tests/test_generation.py` and
`tests/test_pipelines.py`.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "build" / f"transformers-{version('transformers')}"
PACKAGE = "transformers_common_tests"
# What the configuration's tests set and read back: names that every configuration shares.
COMMON_OPTIONS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SmallGPTModel"],
    "id2label": {0: "first", 1: "second"},
    "label2id": {"first": 0, "second": 1},
    "problem_type": "regression",
}


def fetch() -> Path:
    """Download the source distribution of the installed transformers and unpack its tests."""
    if (FOLDER / "tests").exists():
        return FOLDER
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, f"transformers=={version('transformers')}"], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tests = [member for member in tar.getmembers() if member.name.startswith(f"{FOLDER.name}/tests/")]
            tar.extractall(FOLDER.parent, members=tests, filter="data")
    (FOLDER / "tests" / "__init__.py").touch()  # one of the tests imports the folder
    return FOLDER


def common_tests(module: str) -> ModuleType:
    """A module of transformers' tests, imported as part of a package of its own."""
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER / "tests")]
        sys.modules[PACKAGE] = package
        _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _stand_in("utils.test_configuration_utils", config_common_kwargs=COMMON_OPTIONS)
    return importlib.import_module(f"{PACKAGE}.{module}")


def _stand_in(name: str, **content) -> None:
    module = ModuleType(f"{PACKAGE}.{name}")
    module.__dict__.update(content)
    sys.modules[f"{PACKAGE}.{name.split('.')[0]}"] = ModuleType(f"{PACKAGE}.{name.split('.')[0]}")
    sys.modules[module.__name__] = module


if __name__ == "__main__":
    print(fetch())
