"""The seam: a function of a spec runs on some module, somewhere, and gives plain data.

`seam` is what a spec sees; `places` is where an attempt may run: in this process, on ranks, or in a
worker that holds no answers. Arguments and results travel as bytes (`wire`) in every place, so
that all places behave alike.
"""
