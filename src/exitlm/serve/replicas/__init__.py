"""Several copies of the server behind one address: which copy answers a request, and what happens when it dies.

Nothing here knows Ray; :mod:`exitlm.serve.ray_app` starts the processes and hands these parts to it.
"""
