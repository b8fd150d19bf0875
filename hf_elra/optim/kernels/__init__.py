"""Fast paths of updates: ``triton.py`` has the kernels, ``host.py`` what decides about them on the host."""
