"""Files of `torch.save`: `layout` describes one without copying a tensor, `read` rebuilds its state without code.

Both backends, the pipeline and the loader import `layout`, `sources`, `safe_pickle` and `read`; the rest is for these.
"""
