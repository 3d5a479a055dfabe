"""The choice of experts against loops over tokens, groups and experts, with Python floats."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from swift_mega.errors import UserError
from swift_mega.models.modules.router import Routing, choose, refuse_without_effect

APART = 1e-4
"""The smallest gap between chosen and not chosen scores. Sorts decide ties differently, and float32 makes ties of smaller gaps."""


def best(scores: dict[int, float], count: int) -> list[int]:
    """Keys of the largest scores. The example is dropped where the last chosen score is not clearly larger than the first that is not
    chosen."""
    order = sorted(scores, key=lambda key: -scores[key])
    if count < len(order):
        assume(scores[order[count - 1]] - scores[order[count]] > APART)
    return order[:count]


def by_loops(row: list[float], top_k: int, routing: Routing, bias: list[float] | None) -> dict[int, float]:
    """Expert -> weight of one token."""
    if routing.score == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in row]
    else:
        whole = sum(math.exp(logit) for logit in row)
        scores = [math.exp(logit) / whole for logit in row]
    ranked = [score + (bias[expert] if bias else 0.0) for expert, score in enumerate(scores)]
    size = len(row) // routing.groups
    members = {group: range(group * size, (group + 1) * size) for group in range(routing.groups)}
    if routing.groups > 1:
        good = {
            group: sum(sorted((ranked[expert] for expert in experts), reverse=True)[: routing.group_best])
            for group, experts in members.items()
        }
        members = {group: members[group] for group in best(good, routing.chosen_groups)}
    candidates = {expert: ranked[expert] for experts in members.values() for expert in experts}
    weights = {expert: scores[expert] for expert in best(candidates, top_k)}
    if routing.normalise:
        total = max(sum(weights.values()) + routing.added, routing.smallest)
        weights = {expert: weight / total for expert, weight in weights.items()}
    return {expert: weight * routing.scale for expert, weight in weights.items()}


@st.composite
def cases(draw: Any) -> tuple[Tensor, int, Routing, Tensor | None]:
    """Logits [tokens, experts], experts per token, routing and bias."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    chosen = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, chosen * size))
    routing = Routing(
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        bias=draw(st.booleans()),
        normalise=draw(st.booleans()),
        added=draw(st.sampled_from([0.0, 1e-20, 0.25])),
        smallest=draw(st.sampled_from([0.0, 1e-12, 0.6])),
        scale=draw(st.sampled_from([1.0, 0.7, 16.0])),
        groups=groups,
        chosen_groups=chosen,
        group_best=draw(st.integers(1, 2)),
    )
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(3, groups * size, generator=numbers) * draw(st.sampled_from([0.3, 2.0]))
    bias = torch.randn(groups * size, generator=numbers) * 0.3 if routing.bias else None
    return logits, top_k, routing, bias


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_choice_and_its_weights(case: tuple[Tensor, int, Routing, Tensor | None]) -> None:
    logits, top_k, routing, bias = case
    wanted = [by_loops(row, top_k, routing, None if bias is None else bias.tolist()) for row in logits.tolist()]
    weights, chosen = choose(logits, top_k, routing, bias)
    for token, row in enumerate(wanted):
        assert {expert for expert, yes in enumerate(chosen[token].tolist()) if yes} == row.keys()
        full = [row.get(expert, 0.0) for expert in range(logits.shape[1])]
        torch.testing.assert_close(weights[token], torch.tensor(full), rtol=1e-5, atol=1e-7)


@given(cases())
@settings(max_examples=50, deadline=None)
def test_the_gradient_is_that_of_the_weights_alone(case: tuple[Tensor, int, Routing, Tensor | None]) -> None:
    """Against finite differences of the loops, in a random direction. The choice of experts, and the bias, pass no gradient."""
    logits, top_k, routing, bias = case
    listed = None if bias is None else bias.tolist()
    step = 1e-6
    logits.requires_grad_()
    weights, _ = choose(logits, top_k, routing, bias)
    gradient = torch.randn_like(weights)
    (weights * gradient).sum().backward()
    direction = torch.randn(logits.shape, dtype=torch.float64)

    def loss(by: float) -> float:
        rows = (logits.detach().double() + by * direction).tolist()
        return sum(
            weight * float(gradient[token, expert])
            for token, row in enumerate(rows)
            for expert, weight in by_loops(row, top_k, routing, listed).items()
        )

    if routing.normalise:  # the derivative of max(…, smallest) is discontinuous
        for row in logits.detach().double().tolist():
            plain = by_loops(row, top_k, dataclasses.replace(routing, normalise=False, scale=1.0), listed)
            assume(abs(sum(plain.values()) + routing.added - routing.smallest) > APART)
    assert logits.grad is not None
    found = float((logits.grad.double() * direction).sum())
    assert found == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-3, abs=1e-4)


def test_by_hand() -> None:
    """Two groups of two, by softmax of (ln 4, ln 1, ln 3, ln 2): 0.4 0.1 | 0.3 0.2. The best expert is in the first group. By its best
    expert, one group gives experts 0 and 1. By its best two the groups tie at 0.5, and a bias of 0.05 on the last expert decides."""
    logits = torch.tensor([[4.0, 1.0, 3.0, 2.0]]).log()
    one = Routing(score="softmax", bias=False, normalise=False, scale=10.0, groups=2, chosen_groups=1, group_best=1)
    weights, chosen = choose(logits, 2, one, None)
    torch.testing.assert_close(weights, torch.tensor([[4.0, 1.0, 0.0, 0.0]]))
    assert chosen.tolist() == [[True, True, False, False]]
    two = dataclasses.replace(one, bias=True, group_best=2, normalise=True)
    weights, _ = choose(logits, 2, two, torch.tensor([0.0, 0.0, 0.0, 0.05]))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, 6.0, 4.0]]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_narrow_logits_are_scored_in_float32(score: Any) -> None:
    """Weights of bfloat16 logits are bfloat16; scores, order and sums are those of the same logits in float32."""
    logits, bias, routing = torch.randn(64, 32).bfloat16(), torch.randn(32) * 1e-3, Routing(score=score)
    weights, chosen = choose(logits, 8, routing, bias)
    wide, same = choose(logits.float(), 8, routing, bias)
    assert weights.dtype == torch.bfloat16 and torch.equal(chosen, same)
    assert torch.equal(weights, wide.bfloat16())


PLAIN = dict(
    moe_expert_capacity_factor=None, moe_router_num_groups=None,
    moe_router_group_topk=None, moe_router_topk_scaling_factor=None, moe_router_fusion=False, moe_router_pre_softmax=True,
    moe_router_score_function="sigmoid",
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(moe_expert_capacity_factor=1.5), "moe_expert_capacity_factor=1.5"),
        (dict(moe_router_num_groups=4), "moe_router_num_groups=4"),
        (dict(moe_router_group_topk=2), "moe_router_group_topk=2"),
        (dict(moe_router_topk_scaling_factor=2.5), "moe_router_topk_scaling_factor=2.5"),
        (dict(moe_router_fusion=True), "moe_router_fusion=True"),
        (dict(moe_router_pre_softmax=False), "moe_router_pre_softmax=False"),
        (dict(moe_router_score_function="softmax"), "'softmax': .* supports only 'sigmoid'; remove the setting"),
    ],
)
def test_settings_that_would_do_nothing(changes: dict[str, Any], said: str) -> None:
    refuse_without_effect(SimpleNamespace(**PLAIN), Routing(score="sigmoid"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        refuse_without_effect(SimpleNamespace(**{**PLAIN, **changes}), Routing(score="sigmoid"))  # type: ignore[arg-type]
