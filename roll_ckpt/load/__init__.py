"""How a committed checkpoint is opened, verified and read, by one rank and by all together.

Backends and the pipeline import `checkpoint`, `reader`, `together`, `newest`, `compare` and `trust`. A load writes nothing.
"""
