"""The native half: the staging arena, copies, digests and direct I/O, in C++ under csrc/. No torch.

`extension` is the only importer of the compiled module. The rooms above use `image` (what a file holds), `mover`
(saving files) and `files` (reading them), and from `extension` the classes and functions that need no wrapper.
"""
