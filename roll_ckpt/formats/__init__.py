"""What files hold: their bytes, described and parsed, never moved.

`image` says where each byte of a file comes from, `torch_zip` and `dcp` are the tensor files, `records` and `manifests`
the records of a commit, `tensor_index` what each stored tensor is. Every room above imports these modules.
"""
