"""For those who write exercises: the proof, the benchmark, and a template."""
