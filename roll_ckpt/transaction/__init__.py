"""How the files of all ranks become one checkpoint under its name, or nothing: claim, begin, vote, settle, recover.

The rooms above import every module of it. Nothing from here down imports torch, so that the command line answers at
once and a crash test can fork a thousand processes.
"""
