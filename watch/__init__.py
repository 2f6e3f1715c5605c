"""Ways to look at a run from outside: nothing here changes what a step computes.

`Recorder`, `Explainer`, `Metrics`, `Meter` and `Screen` are watchers: the engine calls each entry
of `engine.watchers` with the output of each step, in the thread that steps. A watcher may add
requests and abort them. It must not call `step`. No lesson needs this wing. A file imports only
files above it.

    files      replaces files all together, or none of them
    recorder   one line of JSON a step; the pictures are drawn from it
    roofline   what a machine can do at most, and so how long work takes at least
    explain    where the time of a run's steps goes
    metrics    the numbers of a run for Prometheus, as vLLM names them
    terminal   the blocks of each request and the figures of a run, as text
    tree       the blocks that sequences share as a tree, with reference counts
"""
