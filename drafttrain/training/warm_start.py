"""A head that starts as good as its scalar features alone.

log q(Y) and the entropy of q hold most of what can be predicted, and a logistic regression on them is solved exactly
in a second. A head with those features starts as that regression, its reading of the state silent, so that all of its
training goes into what the state adds. From random weights a short training ends no better than the regression.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.training.calibration import Logistic

_FITTED = ("log_q", "entropy")


def warm_start(head: AcceptanceHead, log_q_N: np.ndarray, entropy_N: np.ndarray, label_N: np.ndarray) -> bool:
    """Start a new head as the logistic regression on log q and entropy, whichever of them it reads.

    The loss weights move the best logit by -log(w_rej / w_acc) everywhere, so they only change the intercept.

    Args:
        head: changed in place.
        log_q_N, entropy_N, label_N: of the training tokens, float64.

    Returns:
        whether there was anything to start from; a head without these features keeps its random weights.
    """
    config = head.config
    scalars = [torch.from_numpy(values) for values in (np.exp(log_q_N), entropy_N, np.ones_like(label_N))]
    if not any(name in config.features for name in _FITTED):
        return False
    known = sum(name in config.features for name in _FITTED)  # their columns come first
    columns_NF = torch.cat(head.scalar_columns(scalars)[:known], dim=1)
    model = Logistic.fit(columns_NF.numpy(), label_N)
    slopes_F = model.weight[:-1] / model.scale
    intercept = model.weight[-1] - float(slopes_F @ model.mean) - math.log(config.w_rej / config.w_acc)
    with torch.no_grad():
        nn.init.zeros_(head.output.weight)
        head.output.bias.fill_(intercept)
        head.feature_output.weight[0, : len(slopes_F)] = torch.from_numpy(slopes_F).float()
    return True
