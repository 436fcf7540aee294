"""Many runs: methods by seeds, studies, and what they say together."""
