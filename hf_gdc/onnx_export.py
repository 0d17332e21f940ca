# SPDX-License-Identifier: Apache-2.0
"""Causal language models as ONNX graphs for small devices, in float32 or 8 bits, by transformers' exporter and ONNX Runtime.

The graph takes a cache and gives one, for any number of rows and tokens: it reads prompts, scores texts and generates.
transformers (5.23 or newer) loads and runs it again: `ExportedModel.from_pretrained(folder)`.

    pip install "hf-gdc[export]"

Left out: sampling on the device, which is a few lines over the logits; other runtimes, for which transformers exports too.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.exporters import ExportedModel, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
from transformers.exporters.base import ExportedComponent
from transformers.exporters.configs import ExportFormat, OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter


@torch.no_grad()
def export_onnx(model: PreTrainedModel) -> ExportedModel:
    """The model's forward pass with a cache as a graph, in the model's precision.

    Called with `input_ids` (B, T), `attention_mask` (B, S + T) and `past_key_values` with S tokens (see `empty_cache`), it
    returns what the model returns: `logits` (B, T, V) and the longer `past_key_values`.
    """
    model = model.eval()
    ids = torch.zeros(2, 3, dtype=torch.long, device=model.device)
    mask = torch.ones(2, 8, dtype=torch.long, device=model.device)
    past = DynamicCache(config=model.config)
    model(input_ids=ids.repeat(1, 2)[:, :5], past_key_values=past, use_cache=True)
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": past}
    exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
    _forget_origins(exported.program)
    return exported


def quantized(exported: ExportedModel) -> ExportedModel:
    """The same graph with 8-bit weights: one scale for each output channel, and activations rounded as they come.

    The products and the embedding are quantised, which is where the weights are; the norms stay as they are.
    """
    (component,) = exported.components.values()
    config = OnnxRuntimeDynamicConfig(per_channel=True, op_types_to_quantize=["MatMul", "Gather"])
    program = OnnxRuntimeQuantizer(config).quantize(component.program, {}, ExportFormat.ONNX)
    _forget_origins(program)
    return ExportedModel(
        {"model": ExportedComponent(program, component.metadata)}, exported.export_format, config=exported.config
    )


def _forget_origins(program) -> None:
    """Drop the exporter's notes on where each node and value came from: for a small model, half of the file."""
    for graph in program.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = value.type = None
                value.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()


def empty_cache(model: PreTrainedModel, batch_size: int) -> Cache:
    """What `past_key_values` is before the first token: keys and values (B, K, 0, D) in every layer."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    nothing = torch.zeros(batch_size, config.num_key_value_heads, 0, size, dtype=model.dtype)
    past = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        past.update(nothing, nothing, layer)
    return past


def generate_greedily(exported: ExportedModel, past: Cache, ids_BT: Tensor, max_new_tokens: int) -> Tensor:
    """(B, T + max_new_tokens): prompts without padding, each with its most likely continuation, regardless of EOS."""
    mask = torch.ones_like(ids_BT)
    step = ids_BT
    for _ in range(max_new_tokens):
        output = exported(input_ids=step, attention_mask=mask, past_key_values=past)
        past, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids_BT = torch.cat((ids_BT, step), 1)
        mask = torch.ones_like(ids_BT)
    return ids_BT


def size_of(folder: str | Path) -> int:
    """Bytes of the graph and its weights in the folder of a saved export."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.onnx*"))
