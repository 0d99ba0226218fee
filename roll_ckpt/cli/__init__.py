"""The command line, roll-ckpt: one file for each command, named after it, with its help text, work and messages.

`main` is the entry point. Nobody imports from here. No module here, nor below it, imports torch.
"""
