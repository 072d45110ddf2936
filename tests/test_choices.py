"""Arguments that take one of a few words."""

from typing import Any

import pytest
import torch
from networks import classes, randn, seeded
from torch import nn

import hesskern as hk
from hesskern.choices import Bias, Method, Output, PublishedMethod, Which, check_choice


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Output, "argument must be 'exact', 'mc' or 'empirical', got 'else'"),
        (Bias, "argument must be 'none' or 'joint', got 'else'"),
        (
            PublishedMethod,
            "argument must be 'base', 'appr', 'iter', 'iter_d' or 'iter_m', got 'else'",
        ),
        (Method, "argument must be 'truncated', 'base', .* or 'iter_m', got 'else'"),
        (Which, "argument must be 'LA', 'SA' or 'LM', got 'else'"),
    ],
)
def test_the_words_are_named(choices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_choice("argument", "else", choices)


def test_users_see_them() -> None:
    model, data = seeded(nn.Linear(3, 2)), [(randn(4, 3), classes(4, c=2))]
    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="output must be 'exact', 'mc' or 'empirical', got None"):
        hk.kronecker_factors(model, data, loss, output=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias must be 'none' or 'joint', got 'both'"):
        hk.layer_hessians(model, data, loss, bias="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which must be 'LA', 'SA' or 'LM', got 'L'"):
        hk.eigsh(torch.eye(3), 1, which="L")  # type: ignore[arg-type]
