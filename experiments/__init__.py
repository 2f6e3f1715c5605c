"""Whatever measures: one experiment a file, each with `add_arguments` and `run`.

`benchmark.py` runs them by name. No lesson needs this wing. A file imports only files above it.

    results       rows with their provenance, appended to a CSV file
    reservations  contiguous memory under the paged engine: buddies and three reservations
    simulate      the real scheduler and allocator under a simulated clock
    gpu_check     one command on a machine with a GPU
"""
