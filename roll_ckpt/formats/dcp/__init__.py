"""Files of torch.distributed.checkpoint: `items` lays a `.distcp` file out, `index` reads `.metadata` without code.

The Megatron backend imports both.
"""
