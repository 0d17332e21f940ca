"""Every import from TRL, in one place: TRL's names move, and here is where to follow them.

Holds for trl 1.12 to 1.16. Public names only; TRL's trainers are never subclassed.
"""

from trl import TrlParser
from trl.models import prepare_deepspeed, prepare_fsdp

__all__ = ["TrlParser", "prepare_deepspeed", "prepare_fsdp"]
