"""Independent tasks, and where they run: on threads or processes of this machine, or on the nodes of a Ray cluster."""
