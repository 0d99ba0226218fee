"""The formats of all files: this room describes and parses bytes, and never copies or writes them.

`image` says where each byte of a file comes from; `torch_zip` and `dcp` are the tensor files; `records`, `manifests`
and `sealed_json` the records of a commit; `tensor_index` tells what each stored tensor is. Every room above uses them.
"""
