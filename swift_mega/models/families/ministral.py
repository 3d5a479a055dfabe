"""Ministral: Mistral where some layers see a window and the others everything."""

from swift_mega.models.decoder import vary
from swift_mega.models.families import mistral

FAMILY = vary(mistral.FAMILY, hf_types=("ministral",), reads=("layer_types",))
