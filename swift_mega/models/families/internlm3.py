"""InternLM 3: the common decoder, with biases on every linear or on none."""

from swift_mega.models.decoder import vary
from swift_mega.models.families import llama

# transformers reads `qkv_bias` and `bias` as Llama's attention_bias and mlp_bias, and refuses configs where they differ.
FAMILY = vary(llama.FAMILY, hf_types=("internlm3",), reads=("qkv_bias", "bias"))
