"""The study of pairs on linear maps: the theory's question where the answer can be measured.

The theory of TAP's paper says that one model for all serves each pair worse as their number grows. Here every pair has a
client, whose target is `y = (W + δ V_p) x + noise` with a matrix V_p of its own, and all share one matrix. A pair's own
optimum is known; δ is how far the optima are apart; the best single matrix for P pairs is `W + δ · mean V`, whose loss is
`δ² (1 − 1/P)` above that of each pair's own, on average over V. Server and clients are those of any other run.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from flwr.app import Context
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tap_flower.client.app import TapClientApp
from tap_flower.client.task import Client, Task
from tap_flower.config import load_config
from tap_flower.core.seeds import named_seed
from tap_flower.core.tasks import TaskKind
from tap_flower.run.in_process import InProcessGrid
from tap_flower.server.strategy import TapStrategy
from tap_flower.study.plan import check_distinct
from tap_flower.study.studies import COMPARED, Study, Tell, Values

INPUTS, OUTPUTS, NOISE = 8, 4, 0.1
"""Sizes of x and y, and the standard deviation of the noise in each number of y."""
EXAMPLES = {"train": 64, "validation": 32, "test": 128}
PAIRS = (1, 2, 4, 8, 16)
SETTINGS = (
    "rounds=4", "train.steps=8", "train.batch_size=16", "train.accumulation=1", "train.learning_rate=0.08",
    "train.weight_decay=0", "distill.iterations=12", "distill.learning_rate=0.04",
)  # fmt: skip
GAP = "Gap to the pair's own optimum", "squared error above that of the optimum (lower is better)"
GRADIENT = "Gradient of the pair's own loss", "norm (0 at the pair's optimum)"
"""(title, unit) of the figures."""


def _losses(output: Tensor, target: Tensor) -> Tensor:
    return (output - target[:, :OUTPUTS]).square().mean(-1)


def _statistics(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    y, best, x = target[:, :OUTPUTS].double(), target[:, OUTPUTS:-INPUTS].double(), target[:, -INPUTS:].double()
    error = output.double() - y
    return {
        "loss": error.square().mean(-1).sum(),
        "best": (best - y).square().mean(-1).sum(),
        "gradient": 2 / OUTPUTS * error.T @ x,
        "units": torch.tensor(float(len(y)), dtype=torch.float64),
    }


def _metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    means = {name: sums[name] / sums["units"] for name in ("loss", "best", "gradient")}
    gap, gradient = means["loss"] - means["best"], means["gradient"].norm()
    return {"loss": float(means["loss"]), "gap": float(gap), "gradient": float(gradient)}


KIND = TaskKind.of(
    "linear_map",
    _losses,
    lambda student, teacher, *_: (student - teacher).square().mean(-1),
    statistics=_statistics,
    metrics=_metrics,
)
"""Regression whose target is y, the optimum's answer and x: the latter two are for the metrics."""


def pairs_in_theory(seeds: Sequence[int], disagreement: float, tell: Callable[[str], None]) -> Study:
    """The study of pairs on linear maps, which needs no data and a few minutes of one core.

    Args:
        seeds: seeds of the runs; each draws its own maps, data and first values.
        disagreement: δ.
        tell: called with a line for each seed that is done.

    Raises:
        ConfigError: a seed is given twice.
    """
    check_distinct("--seed", seeds)

    def measure(_: Tell) -> Iterator[tuple[float, Values]]:
        for number, seed in enumerate(seeds, 1):
            for pairs in PAIRS:
                yield pairs, measured(pairs, seed, disagreement)
            tell(f"{number}/{len(seeds)} seed {seed}")

    return Study(
        "pairs",
        "Does one model for all serve each pair worse as their number grows?",
        f"Linear maps from {INPUTS} to {OUTPUTS} numbers, one client a pair, all of one matrix; the pairs' optima are a "
        f"distance of {disagreement:g} from a common one, in directions of their own. Every client takes part in each of 4 "
        f"rounds of 8 steps. Means over the pairs of a federation, 95 % interval over {len(seeds)} seeds.",
        "pairs in the federation",
        (),
        measure,
        by_doubling=True,
    )


def measured(pairs: int, seed: int, disagreement: float) -> Values:
    """Gap and gradient norm of the models of a federation of so many pairs, means over the pairs."""
    app = TapClientApp()
    with tempfile.TemporaryDirectory() as folder, _quiet():

        @app.client()
        def client(context: Context) -> Client:
            return _client(int(context.node_config["partition-id"]), seed, disagreement, Path(folder) / "clients")

        config = load_config("plug-in", settings=(*SETTINGS, f"clients_per_round={pairs}", f"seed={seed}"))
        grid = InProcessGrid(app, [{"partition-id": pair} for pair in range(pairs)], {})
        found = TapStrategy(config=config, run_folder=Path(folder) / "run").start(grid).tasks
    of_pairs = list(found.values())
    return {
        figure: {model: sum(by_model[model][key] for by_model in of_pairs) / pairs for model in COMPARED}
        for figure, key in ((GAP, "gap"), (GRADIENT, "gradient"))
    }


def _client(pair: int, seed: int, disagreement: float, folder: Path) -> Client:
    name = f"pair-{pair}"

    def drawn(what: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(named_seed(seed, what)))

    common, own = (drawn(what, OUTPUTS, INPUTS) / INPUTS**0.5 for what in ("common", name))
    optimum = common + disagreement * own

    def data(split: str) -> TensorDataset:
        x = drawn(f"{name} {split}", EXAMPLES[split], INPUTS)
        best = x @ optimum.T
        y = best + NOISE * drawn(f"{name} {split} noise", EXAMPLES[split], OUTPUTS)
        return TensorDataset(x, torch.cat([y, best, x], -1))

    task = Task(
        name,
        KIND,
        ["numbers"],
        data("train"),
        data("test"),
        forward=lambda net, batch: net(batch[0]),
        target=lambda batch: batch[1],
        validation=data("validation"),
    )
    return Client(name, lambda: nn.Linear(INPUTS, OUTPUTS, bias=False), [task], state_dir=folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """A hundred federations would fill the terminal with their rounds."""
    loggers = [logging.getLogger(name) for name in ("flwr", "tap_flower")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
