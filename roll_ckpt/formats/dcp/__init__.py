"""Files of torch.distributed.checkpoint (DCP): `items` lays out `.distcp` files, `index` reads `.metadata` safely.

The Megatron backend imports both.
"""
