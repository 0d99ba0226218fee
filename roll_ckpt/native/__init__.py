"""The native half: the staging arena, copies, digests and direct I/O, in C++ under csrc/. No torch.

`extension` alone imports the compiled module; `image`, `mover` and `files` are what the rooms above use of it.
"""
