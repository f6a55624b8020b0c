"""The rule of dgc.AdamW: Adam's moments of each rank's own gradients, and a direction, which v accumulates.

With h a rank's gradient, t the number of its gradients so far, and N ranks:

    m <- beta1*m + (1-beta1)*h
    s <- beta2*s + (1-beta2)*(a*h^2 + (1-a)*mh^2)             mh = m / (1-beta1^t)
    v <- v + lr * h / (sqrt(s / (1-beta2^t)) + eps)

The k largest entries of v are sent, and every rank subtracts their mean from the parameters. The paper has no Adam.

Adam's own direction has m in place of h. m is an average of the last gradients, and the sum of all m is that of all h.
v adds up over all steps for which an entry waits, many more than m averages, so that m would only come later: after an
entry was sent, m would go on pushing in the same direction, and the entry would overshoot. docs/results.md has what
this costs, and what masking m (paper, section 3.2) would save of it. So m serves s alone, and dense parameters.

A rank's h^2 is too large, since dense Adam divides by the second moment of the mean of N gradients. With S the square
of the expected gradient and V the variance of h, E[h^2] = S + V and E[mh^2] = S + c*V, where c = (1-beta1)/(1+beta1) is
the sum of the squared weights in m. Wanted is S + V/N, which a*h^2 + (1-a)*mh^2 has for a = 1 - (1-1/N)/(1-c). Without
this, steps are up to sqrt(N) times too small. Where N is so large that a would be negative, it is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

from . import saved
from .saved import Format

FIRST, SECOND = "exp_avg", "exp_avg_sq"
"""The kinds of tensor that the rule keeps, m and s, by the names of torch.optim.AdamW."""
SMALLEST = torch.finfo(torch.float32).tiny
"""Of eps: a smaller one would be 0, or nearly, in the kernels' float32."""


def own_share(beta1: float, workers: int) -> float:
    """Returns a, the weight of a rank's squared gradient in s; the rest is that of its squared momentum.

    Args:
        beta1: decay of m, in [0, 1).
        workers: N, the number of gradients whose mean dense Adam would take.
    """
    c = (1 - beta1) / (1 + beta1)
    # With beta1 = 0 the momentum is the gradient, and tells nothing more of the noise.
    return max(0.0, 1 - (1 - 1 / workers) / (1 - c)) if c < 1 else 1.0


def factors(group: Mapping[str, Any], t: int, workers: int) -> tuple[float, ...]:
    """Returns 1-beta1, beta2, the weights of h^2 and m^2 in s, lr, sqrt(1-beta2^t) and eps.

    Args:
        group: a parameter group.
        t: the number of the gradient, from 1.
        workers: N.
    """
    beta1, beta2 = map(float, group["betas"])
    unbias, own = 1 - beta1**t, own_share(beta1, workers)
    return (
        1 - beta1,
        beta2,
        (1 - beta2) * own,
        (1 - beta2) * (1 - own) / unbias**2,
        float(group["lr"]),
        (1 - beta2**t) ** 0.5,
        float(group["eps"]),
    )


def format_of(twin: str) -> Format:
    """Returns the settings and the state of Adam or AdamW."""
    return Format(
        twin=twin,
        numbers=("lr", "weight_decay"),
        needed=("lr", "betas", "eps", "weight_decay", "amsgrad"),  # RAdam has all the others
        unsupported={"amsgrad": False, "maximize": False, "capturable": False, "differentiable": False},
        hints={"foreach": None, "fused": None, "decoupled_weight_decay": twin == "AdamW"},
        tensors=(FIRST, SECOND),
        empty=(FIRST, SECOND),
    )


def check_groups(groups: Iterable[Mapping[str, Any]], form: Format) -> None:
    """Refuses parameter groups whose values DGC cannot honour.

    Raises:
        ValueError: the message names the value.
    """
    for group in groups:
        saved.check_groups([group], form)
        if group["weight_decay"] and not group.get("decoupled_weight_decay", form.hints["decoupled_weight_decay"]):
            raise ValueError(
                f"weight_decay: expected 0, got {group['weight_decay']!r}, which torch.optim.Adam adds to gradients. "
                "DGC has the decoupled one only: use dgc.AdamW, or decoupled_weight_decay=True"
            )
        betas, eps = group.get("betas"), group.get("eps")
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(_is_beta(beta) for beta in betas)):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        if not (isinstance(eps, Real) and SMALLEST <= float(eps) < float("inf")):
            raise ValueError(
                f"eps: expected a finite number >= {SMALLEST:.3g}, got {eps!r}: with 0, an entry that never had a "
                "gradient, as in the row of a rare word, would be 0/0"
            )


def _is_beta(beta: object) -> bool:
    return isinstance(beta, Real) and not isinstance(beta, bool) and 0 <= float(beta) < 1
