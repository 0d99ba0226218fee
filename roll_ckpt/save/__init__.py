"""The save of one process: begin, stage, write, vote, and wait for the outcome.

Backends and the pipeline import `begin`, `save`, `cluster_save`, `pending`, `claims`, `arena` and `one_file`.
"""
