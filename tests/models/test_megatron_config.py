"""Fields of Megatron's config that a user hands on: each takes effect or is refused."""

import dataclasses

import pytest

from swift_mega import api  # noqa: F401 - the facade comes before Megatron
from swift_mega.errors import UserError
from swift_mega.models.megatron_config import DERIVED, UNREAD, check_passthrough


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"moe_router_topk_": 2}, "no such field; did you mean moe_router_topk?"),
        ({"num_layers": 2}, "this follows from the model and the layout"),
        ({"attention_dropout": 0.1}, "model.megatron.attention_dropout=0.1 would have no effect"),
        ({"window_size": [128, 0]}, "takes windows from the model's config.json"),
        ({"cp_comm_type": "a2a"}, "this follows from the model and the layout"),
        ({"cpu_offloading": True}, "set train.offload_activations"),
    ],
)
def test_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=r"model\.megatron") as error:
        check_passthrough(given)
    assert said in str(error.value)


def test_what_changes_nothing_is_taken() -> None:
    check_passthrough({"attention_dropout": 0.0, "attention_softmax_in_fp32": True, "moe_router_topk": 2})


def test_the_names_are_megatrons() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert UNREAD.keys() <= known
    assert not UNREAD.keys() & DERIVED
