"""`python -m benchmarks.simulation`."""

from benchmarks.simulation import main

main()
