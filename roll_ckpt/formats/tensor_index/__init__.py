"""The tensor index: what each stored tensor of a rank is of the model, and where its bytes lie.

`layout` is the binary format. `writer` makes it from the `meanings` that a backend gives to tensors; `reader` parses it
and `checks` it; `cover` tells whether pieces are all of a tensor. Backends, save and load import these.
"""
