"""How roll_ckpt gets into a process that does not import it: the `.pth` file, the import hook, the variable ROLL_CKPT.

It installs the backends when their frameworks are imported, and holds training up where that fails. `roll_ckpt.run`,
the public modules and the command line import it. Importing it needs the standard library only.
"""
