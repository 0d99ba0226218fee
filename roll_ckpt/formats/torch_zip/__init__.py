"""Files of `torch.save`: `layout` describes one without copying a tensor, `read` rebuilds its state and runs no code.

The backends, the pipeline and `load/` import `layout`, `sources`, `safe_pickle` and `read`; the rest serves these.
"""
