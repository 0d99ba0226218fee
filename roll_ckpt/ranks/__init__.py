"""What concerns the ranks of one torchrun job: `group`, how they agree, and `rng`, their random states.

Save, load, the backends and the pipeline import these.
"""
