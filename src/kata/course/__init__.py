"""The course as files: the floors, stubs made from solutions, and variants of a solution.

Nothing here runs anybody's code or imports more than the standard library and msgspec, so that nox
can read the catalog from outside the environment.
"""
