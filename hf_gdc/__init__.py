"""hf_gdc: train language models to match a distribution that you can write down.

The public names, imported when they are first used. Importing the package makes transformers' Auto classes know the model
type `small_gpt`, without importing transformers itself.
"""

import importlib
import importlib.abc
import importlib.util
import sys

__version__ = "0.1.0"

_PUBLIC = {
    "divergences": ["Divergence", "available_divergences", "get_divergence"],
    "metrics": ["load_metric"],
    "images.arguments": ["ImageGANConfig"],
    "images.data": ["ImageDataset", "load_images"],
    "images.sampling": ["ImageRejectionSampler"],
    "models": [
        "DCGANConfig",
        "DCGANDiscriminator",
        "DCGANGenerator",
        "SmallGPTConfig",
        "SmallGPTForCausalLM",
        "SmallGPTForMaskedLM",
        "SmallGPTForQuestionAnswering",
        "SmallGPTForSequenceClassification",
        "SmallGPTForTokenClassification",
        "SmallGPTModel",
    ],
    "quasi_rejection": ["QuasiRejectionSampler"],
    "rollouts": ["Rollouts"],
    "targets": ["Discriminator", "Moment", "Pointwise", "Policy", "Reference", "Reward", "Target", "Teacher"],
    "trainers.distillation": ["DistillationConfig", "DistillationTrainer"],
    "trainers.gan": ["GANConfig", "GANTrainer"],
    "trainers.gdc": ["GDCConfig", "GDCTrainer"],
    "trainers.image_gan": ["ImageGANTrainer"],
    "trainers.ppo": ["PPOConfig", "PPOTrainer"],
    "trainers.unified": ["UnifiedConfig", "UnifiedTrainer"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'hf_gdc' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


class _RegisterLater(importlib.abc.MetaPathFinder):
    """Registers the models right after transformers is first imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            importlib.import_module(".models", __name__).register()

        spec.loader.exec_module = execute_and_register
        return spec


if "transformers" in sys.modules:
    importlib.import_module(".models", __name__).register()
else:
    sys.meta_path.insert(0, _RegisterLater())
