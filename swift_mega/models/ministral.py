"""Ministral: Mistral where some layers see a window and the others everything."""

from swift_mega.models import mistral
from swift_mega.models.decoder import vary

FAMILY = vary(mistral.FAMILY, hf_types=("ministral",), reads=("layer_types",))
