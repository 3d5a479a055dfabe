"""Text generation with a model: what `api.infer` returns."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from swift_mega.api.ready import DEVICE
from swift_mega.convert.files import stream
from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.data.chat import Encoder, load_tokenizer
from swift_mega.data.vocabulary import check_tokens
from swift_mega.errors import UserError
from swift_mega.export.companions import UNCHANGED, of_adapter, stop_tokens
from swift_mega.export.in_memory import load_merged
from swift_mega.models.family import family_of
from swift_mega.models.quantization import FLAG, quantization_of, stored_dtype
from swift_mega.models.translate import hf_config
from swift_mega.tuners.lora_files import read_adapter


class Answerer:
    """A Hugging Face model, optionally with an adapter, that generates replies by greedy decoding.

    The chat template is the given one, else the adapter's, else the model's. Generation stops at the tokens that end a reply in this
    template, and at those of generation_config.json. Weights are read for the first answer, so prompts can be made without them.
    """

    def __init__(
        self, model: str, adapters: str | None = None, chat_template: str | None = None, dequantize: bool = False
    ) -> None:
        family_of(model)
        self._model, self._adapters, self._dequantize = model, adapters, dequantize
        if dequantize and quantization_of(model) is None:
            raise UserError(f"{FLAG}: {model} is not quantised; remove it")
        before = UNCHANGED
        if adapters is not None:
            read_adapter(adapters)
            before = of_adapter(adapters)
        self.tokenizer = load_tokenizer(model)
        encoder = Encoder(self.tokenizer, chat_template=chat_template, template=before.chat_template)
        self.template = encoder.template
        self.stop_tokens = list(dict.fromkeys([*stop_tokens(model), *before.end_tokens, *encoder.end_of_turn()]))

    @cached_property
    def network(self) -> Any:
        """The model on its device."""
        if self._dequantize:
            with tempfile.TemporaryDirectory(prefix="swift-mega-infer-") as folder:
                plain = Path(folder) / "plain"
                weights = open_checkpoint(self._model, stored_dtype(self._model))
                stream.restream(weights, plain, max_shard_bytes=1 << 62)
                return self._load(str(plain))
        if quantization_of(self._model) is None:
            return self._load(self._model)
        try:
            return self._load(self._model)
        except (ImportError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"transformers cannot run the quantised weights of {self._model} here ({reason[:300]}); pass {FLAG} to read them as "
                "plain weights"
            ) from error

    def _load(self, model: str) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        config = hf_config(model)
        network: Any = (
            AutoModelForCausalLM.from_pretrained(model, config=config, dtype="auto", trust_remote_code=False)
            if self._adapters is None
            else load_merged(model, self._adapters, config)
        )
        return network.to(DEVICE.device).eval()

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text for a conversation of {"role", "content"} messages; UserError where the template raises an error."""
        return self.template.prompt([dict(message) for message in messages])

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt; UserError where the template raises an error, or a token has no embedding."""
        # The template has already written all special tokens, also the first one.
        asked: list[int] = self.tokenizer(self.prompt(messages), add_special_tokens=False)["input_ids"]
        vocab = hf_config(self._model).get_text_config().vocab_size
        check_tokens(asked, vocab, self.tokenizer, where="the conversation")
        return asked

    def answer(self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int = 256) -> str:
        """The reply to a conversation of {"role", "content"} messages."""
        asked = torch.tensor([self.tokens(messages)], device=DEVICE.device)
        with torch.inference_mode():
            made = self.network.generate(
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.stop_tokens or None,
                pad_token_id=self.tokenizer.eos_token_id,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        return self.tokenizer.decode(made[0, asked.shape[1] :], skip_special_tokens=True).strip()
