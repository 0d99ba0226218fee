"""The command line, roll-ckpt: one file for each command, which holds its help text, its work and its messages.

`main` is the entry point. Nobody imports from here. No module here, nor below it, imports torch.
"""
