"""Every import from TRL, in one place: TRL's names move, and here is where to follow them.

Holds for trl 1.12 to 1.16. Public names only; TRL's trainers are never subclassed.
"""

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl.models import prepare_deepspeed, prepare_fsdp

__all__ = [
    "ModelConfig",
    "TrlParser",
    "get_peft_config",
    "get_quantization_config",
    "prepare_deepspeed",
    "prepare_fsdp",
]
