"""One run of a spec file: the plugin's work, the report as data, names of mistakes, warm processes.

It does not know who reads the report: the learner's verdict, the proof and the grader do.
"""
