"""The learner's side: the verdict as text, watching, the record of runs and progress.md."""
