"""The ranks of one torchrun job: `group` is how they agree, `rng` captures and restores their random states.

Imported by `save`, `load`, `backends` and `pipeline`.
"""
