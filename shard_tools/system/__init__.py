"""The process and its machine: cores, memory, threads, locks, standard streams, progress, and how a command exits."""
