"""Every import from TRL, in one place: TRL's names move, and here is where to follow them.

Holds for trl 1.12 to 1.16. Public names only; TRL's trainers are never subclassed.
"""

import trl
from packaging.version import Version
from trl import ModelConfig, RewardConfig, RewardTrainer, TrlParser, get_peft_config, get_quantization_config
from trl.import_utils import is_vllm_available
from trl.models import prepare_deepspeed, prepare_fsdp

__all__ = [
    "ModelConfig",
    "RewardConfig",
    "RewardTrainer",
    "TrlParser",
    "get_peft_config",
    "get_quantization_config",
    "is_vllm_available",
    "prepare_deepspeed",
    "prepare_fsdp",
    "vllm_engine",
    "vllm_logprobs_mode",
]


def vllm_engine(**options):
    """TRL's `VLLMGeneration`, which has `sync_weights()` and `generate(prompts, images, num_generations)`. Imported when it
    is asked for: it brings a web client with it."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(**options)


def vllm_logprobs_mode(engine) -> str:
    """Which log-probs the server of such an engine reports; TRL before 1.16 can't tell."""
    if Version(trl.__version__) < Version("1.16"):
        return "log-probs of an unknown kind"
    return engine.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
