"""The options of the methods that TAP is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from tap_flower.config.declare import option


@dataclass
class Baselines:
    """Hyper-parameters of the methods that TAP is compared with, in their papers' notation."""

    fedprox_mu: float = option(0.01, "μ of fedprox: weight of its penalty", 0.0, 1e3)
    ditto_lambda: float = option(0.1, "λ of ditto: how near the personal model stays to the server's", 0.0, 1e3)
    pfedme_lambda: float = option(0.01, "λ of pfedme: how near θ stays to w", 0.0, 1e3)
    pfedme_rate: float = option(75.0, "η of pfedme: w ← w − η·λ·(w − θ), where η·λ is at most 1", 0.0, 1e3)
    pfedme_inner_steps: int = option(5, "K of pfedme: optimiser steps of θ for each step of w", 1, 1000)
    per_fedavg_rate: float = option(0.01, "α of per-fedavg: rate of the step that it looks ahead", 0.0, 1.0)
    fedrep_head_share: float = option(
        0.9,
        "of fedrep: share of a participation's steps that train the heads, before the base; 0.5 is FedAlt",
        0.0,
        1.0,
    )
    fedala_rate: float = option(1.0, "η of fedala: rate of the weights W of its heads", 0.0, 1e6)
    fedala_share: float = option(0.8, "s of fedala: steps that learn W, for each step that trains the model", 0.0, 1.0)
    fedala_start: int = option(10, "of fedala: how many times as many steps learn W when a client begins to", 1, 100)
    apfl_alpha: float = option(0.5, "α of apfl to begin with: share of the client's own model in its mixture", 0.0, 1.0)
    apfl_rate: float = option(0.1, "η of apfl: rate of α, which moves once in a participation; 0: α stays", 0.0, 1e6)
    feddat_weight: float = option(1.0, "of feddat: weight of the mutual distillation beside the task's loss", 0.0, 1e6)
    feddat_temperature: float = option(3.0, "of feddat: temperature of the mutual distillation", 0.01, 100.0)
