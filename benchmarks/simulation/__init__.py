"""`python -m benchmarks.simulation --json FILE`: seconds a round of FedAvg, for several frameworks on this machine.

Every framework has the same clients with the same made-up images, the same small CNN (28,948 parameters), and one pass of
plain SGD over a sampled client's images; with the defaults 10 of 100 clients in a round, 10 batches of 20 images each, on
the processor. Each way to run it is a process of its own:

* Flower's own simulation, and tap-flower's `fedavg`, through Ray: `flwr.simulation.run_simulation`, a core for each client;
* the same two in one process, where messages are calls of functions and torch has all cores;
* pfl-research in one process, with the interpreter of an environment of its own, `--pfl-python PATH`; without one it is left
  out, which the table says.

`s a round` is the median over the rounds after the first, `ratio` that to Flower's own simulation, `loss` the final model's
on images that no client has: they show that all do the same work, and are not equal, since each samples clients in its way.
"""


def main() -> None:
    """Runs the comparison."""
    from benchmarks.simulation.command import main as run

    run()
