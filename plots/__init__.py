"""Pictures of runs and of measured rows, drawn by code.

No lesson needs this wing. A file imports only files above it.

    tables     the tables of README.md and docs/, written from rows
    palette    one colour a request, readable on light and dark
    pictures   what a run looks like: the pool, a block table, memory, two ways to batch
    draw       the program that draws every picture in `docs/`
"""
