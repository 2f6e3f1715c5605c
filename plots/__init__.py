"""Pictures of runs and of measured rows, drawn by code.

No lesson needs this wing. A file imports only files above it.

    gpu        what one GPU has shown: its rows as tables and sentences
    tables     the tables of README.md and docs/, written from rows
    palette    one colour a request, readable on light and dark
    pictures   the parts and what flows between them; a run's blocks, tables and batches
    trees      blocks that sequences share: prefix tree, beam tree, copies of a fork
    draw       the program that draws every picture in `docs/`
"""
