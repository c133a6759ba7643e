"""The native CPU library: C++ kernels, how they are built and loaded, and what calls them.

Importing this package, ``build`` and ``library`` needs the standard library alone.
"""
