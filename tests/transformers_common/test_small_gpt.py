# SPDX-License-Identifier: Apache-2.0
"""transformers' common tests of models, configurations and training, on every class of the small GPT.

    make test-transformers

They are taken from the source distribution of the installed version (`transformers_sources.py`), not copied. Left out, because
the distribution lacks modules that they need: the mixins of generation (`tests/test_generation.py` has our own), pipelines
(`tests/test_pipelines.py`), export (`tests/test_export.py`), and tensor and expert parallelism.
"""

import unittest

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers_sources import FOLDER, common_tests

from hf_gdc.models import (
    SmallGPTConfig,
    SmallGPTForCausalLM,
    SmallGPTForMaskedLM,
    SmallGPTForQuestionAnswering,
    SmallGPTForSequenceClassification,
    SmallGPTForTokenClassification,
    SmallGPTModel,
)

if not (FOLDER / "tests").exists():
    pytest.skip(f"transformers' tests are not in {FOLDER}: run `make test-transformers`", allow_module_level=True)

modeling = common_tests("test_modeling_common")
configuration = common_tests("test_configuration_common")
training = common_tests("test_training_mixin")

pytestmark = pytest.mark.slow

NO_DEVICE = "it needs an accelerator, and CI has none"
FLASH = "it needs an accelerator and Flash Attention, and CI has neither"
DEEPSPEED = "it needs an accelerator and DeepSpeed, and CI has neither"
COMPOSITE = "it is about models made of several models, such as one for images and one for text"
ROPE = "it is about models that rescale their rotary positions: this one has no `rope_parameters`"
CONVERSION = "it is about models whose weights have other names in their files, and these have the same"
FP32 = "it is about models that keep some modules in float32: this one computes there in float32 and keeps none"
EXPERTS = "it is about mixtures of experts"

# Every test that is skipped, by a part of its name, with the reason. Another skip is a failure (`conftest.py`).
SKIPS = {
    "test_attn_implementation_composite_models": COMPOSITE,
    "test_can_set_attention_dynamically_composite_model": COMPOSITE,
    "test_internal_model_config_and_subconfig_are_same": COMPOSITE,
    "test_sdpa_can_dispatch_composite_models": COMPOSITE,
    "test_can_load_with_device_context_manager": NO_DEVICE,
    "test_can_load_with_global_device_set": NO_DEVICE,
    "test_cpu_offload": NO_DEVICE,
    "test_disk_offload": NO_DEVICE,
    "test_flex_attention_with_grads": NO_DEVICE,
    "test_kernels_can_load_without_crashing": NO_DEVICE,
    "test_model_parallelism": NO_DEVICE,
    "test_sdpa_can_compile_dynamic": NO_DEVICE,
    "test_sdpa_can_dispatch_on_flash": NO_DEVICE,
    "test_torch_compile_for_training": NO_DEVICE,
    "test_flash_attn": FLASH,
    "_with_deepspeed": DEEPSPEED,
    "test_model_rope": ROPE,
    "test_vision_axial_rope": ROPE,
    "test_can_load_from_already_mapped_keys": CONVERSION,
    "test_reverse_loading_mapping": CONVERSION,
    "test_keep_in_fp32_modules": FP32,
    "test_eager_matches_batched_and_grouped_inference": EXPERTS,
    "test_moe_models_record_router_logits": EXPERTS,
    "test_output_router_logits_from_config": EXPERTS,
    "CausalTest::test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": "it stops at the generic heads, whose "
    "signature hides `output_attentions` from it; `BidirectionalTest` runs it",
    "test_encoder_decoder_loss_no_double_shift": "it is about encoders with decoders",
    "BidirectionalTest::test_causal_lm_loss_honors_shift_labels": "it is about decoders; `CausalTest` runs it",
    "test_resize_position_vector_embeddings": "rotary positions have no table to resize",
    "test_sliding_window_mask": "it is about models with sliding windows",
}

# The common tests choose a class's inputs, labels and output by these tables.
for table, model_class in {
    "MODEL_MAPPING_NAMES": SmallGPTModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": SmallGPTForCausalLM,
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": SmallGPTForMaskedLM,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": SmallGPTForQuestionAnswering,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": SmallGPTForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": SmallGPTForTokenClassification,
}.items():
    getattr(modeling_auto, table)["small_gpt"] = model_class.__name__


class Shape:
    """What the mixins ask: a tiny configuration, with inputs."""

    base_model_class, causal_lm_class = SmallGPTModel, SmallGPTForCausalLM
    batch_size, seq_length, is_training = 5, 7, True

    def __init__(self, parent: unittest.TestCase, **options):
        self.parent, self.options = parent, options
        shape = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        for name, value in shape.items():
            setattr(self, name, value)
        self.shape = shape | {"intermediate_size": 37, "num_key_value_heads": 2}

    def get_config(self) -> SmallGPTConfig:
        return SmallGPTConfig(**self.shape, pad_token_id=0, **self.options)

    def prepare_config_and_inputs_for_common(self):
        ids = modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(ids).tril()  # each row ends later than the one before
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class CausalTest(modeling.ModelTesterMixin, training.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (
        SmallGPTModel,
        SmallGPTForCausalLM,
        SmallGPTForSequenceClassification,
        SmallGPTForTokenClassification,
        SmallGPTForQuestionAnswering,
    )
    all_generative_model_classes = ()  # tests/test_generation.py
    test_can_init_all_missing_weights_before_2023 = True  # else it is skipped for files without a year of copyright
    model_tester = None

    def setUp(self):
        self.model_tester = Shape(self)
        self.config_tester = configuration.ConfigTester(self, config_class=SmallGPTConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()


class BidirectionalTest(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SmallGPTModel, SmallGPTForMaskedLM, SmallGPTForSequenceClassification)
    all_generative_model_classes = ()
    test_can_init_all_missing_weights_before_2023 = True  # else it is skipped for files without a year of copyright
    model_tester = None

    def setUp(self):
        self.model_tester = Shape(self, is_causal=False)


class RecurrentTest(modeling.ModelTesterMixin, training.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (SmallGPTModel, SmallGPTForCausalLM, SmallGPTForSequenceClassification)
    all_generative_model_classes = ()
    test_can_init_all_missing_weights_before_2023 = True  # else it is skipped for files without a year of copyright
    model_tester = None

    def setUp(self):
        self.model_tester = Shape(self, recurrent_type="gru", token_shift=True)
