"""Many runs: sweeps over methods and seeds, studies, and their statistics."""
