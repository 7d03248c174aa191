"""tensor-kata: the runner of ninety-nine katas."""
