"""`python -m benchmarks.gpu --json FILE`: checks a GPU in one command, and measures it.

The parts, one after the other:

* `parity`: the tiny golden models against golden numbers and the CPU, see `benchmarks.parity`;
* `flava`, `vilt`: a step at full size with random weights, as in `benchmarks.step`: of all tasks of the paper's pattern 7,
  batches of 8, 32 and 64, float32 and bfloat16; its share of the matrix product's speed, its peak memory;
* `participation`: where the time of two participations goes, see `benchmarks.participation`;
* `demo`: the first round of the demo, all clients in one process;
* `graph`: a step over memory of its own launched as always, compiled, and replayed as a CUDA graph;
* `at-once`: participations of four of the demo's clients in one process, 1, 2 and 4 at a time, each in a stream of its own;
* `loader`: images a second that the loader decodes, pins and copies to the GPU;
* `deterministic`: participations with one seed, with and without `compute.deterministic`: that they are equal with it,
  and what it costs;
* `flava-compiled`, `vilt-compiled`: the steps again under torch.compile; `first s` is the one that compiles.

Each part is a process of its own with a time limit of its own: its share of what is left of `--minutes`, by its `seconds` in
PARTS. What it has found is printed, and written to FILE, row by row; a part that fails or hangs leaves the others alone.
float32 is computed without TF32. torch, transformers, OmegaConf and Rich are enough; `demo`, `at-once` and `loader` also
need Flower or the demo's data, and are skipped where these are not installed. Nothing is downloaded.

With `--device cpu` the same parts run on the processor, where a step that is called again stands in for a CUDA graph.

The exit status is 1 where a part failed or parity was not shown.
"""


def main() -> None:
    """Runs the check."""
    from benchmarks.gpu.command import main as run

    run()
