"""Ministral: Mistral in which some layers have a sliding window, and the others attend to all tokens."""

from swift_mega.models.decoder import vary
from swift_mega.models.families import mistral

FAMILY = vary(mistral.FAMILY, hf_types=("ministral",), reads=("layer_types",))
