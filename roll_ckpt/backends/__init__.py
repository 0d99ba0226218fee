"""How each framework saves and loads: `backend` is what the pipeline asks of one, and each has a folder of its own.

The pipeline imports `backend` alone, a public module what its framework's folder allows. A framework is imported only
inside its folder, and only once a script uses it. `plain` is for scripts without a framework.
"""
