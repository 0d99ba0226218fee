"""How each framework saves and loads: one folder for each, and `backend`, what the pipeline asks of them.

The pipeline imports `backend` alone. A framework is imported only inside its folder, and only once a script uses it.
"""
