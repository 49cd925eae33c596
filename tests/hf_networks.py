"""Small transformers models of the architectures that differ most, saved as transformers saves them."""

import torch
import transformers

from lrconvert.inputs import examples
from lrconvert.models import find_architecture
from lrconvert.outputs import tensors_in

TEXT = {"vocab_size": 99, "max_position_embeddings": 32}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
HEADS = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _clip():
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    return transformers.CLIPConfig(
        text_config={**TEXT, **SIZES, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1},
        vision_config=vision,
        projection_dim=48,
    )


NETWORKS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=99, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=98, eos_token_id=98
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=99,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_mel_bins=16,
            max_source_positions=24,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
    "clip": lambda: transformers.CLIPModel(_clip()),
    # Mixtures of experts: apart in the file, together in it with the inputs first, and under another name in it.
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, **SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **{**TEXT, **SIZES, **HEADS}, head_dim=16, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE
        )
    ),
    "granite_moe": lambda: transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(**TEXT, **SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    ),
}


def build(name):
    """A dense model in eval mode whose weights are large enough to matter."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def run(model, folder, batch=2):
    """All outputs of a model for random inputs of those that a folder's architecture takes, flattened."""
    inputs = find_architecture(f"hf/{folder}").inputs
    _, named = examples(inputs, batch, torch.float32)
    with torch.no_grad():
        return torch.cat([tensor.flatten() for tensor in tensors_in(model(**named))])
