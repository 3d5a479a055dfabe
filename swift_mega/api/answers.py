"""Asking a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from swift_mega import device as devices
from swift_mega.data.chat import load_tokenizer
from swift_mega.data.vocabulary import check_tokens
from swift_mega.export import merged
from swift_mega.models.family import family_of
from swift_mega.models.translate import hf_config

DEVICE = devices.setup()


class Answerer:
    """A Hugging Face model, with an adapter or without, that answers greedily."""

    def __init__(self, model: str, adapters: str | None = None) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        family_of(model)
        self.tokenizer = load_tokenizer(model)
        network: Any = AutoModelForCausalLM.from_pretrained(
            model, config=hf_config(model), dtype="auto", trust_remote_code=False
        )
        if adapters is not None:
            from peft import PeftModel

            merged.read_adapter(adapters)
            network = PeftModel.from_pretrained(network, adapters)
        self.network = network.to(DEVICE.device).eval()
        self.vocab: int = self.network.get_input_embeddings().weight.shape[0]

    def answer(self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int = 256) -> str:
        """The reply to a conversation of {"role", "content"} messages."""
        rendered = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(DEVICE.device)
        check_tokens(rendered["input_ids"][0].tolist(), self.vocab, self.tokenizer, where="the conversation")
        with torch.inference_mode():
            made = self.network.generate(
                **rendered, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.tokenizer.eos_token_id,
                temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
        return self.tokenizer.decode(made[0, rendered["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def infer(*, model: str, adapters: str | None = None) -> Answerer:
    """Loads a model once; `.answer(messages)` asks it."""
    return Answerer(model, adapters)
