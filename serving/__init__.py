"""Ways in from outside: an HTTP server that OpenAI's clients can talk to.

`python -m serving.server` starts it (`make serve`). It needs the packages of
requirements-serve.txt. No lesson needs this wing. A file imports only files above it.

    engine_thread   the engine in a thread of its own; what it writes, handed to an event loop
    openai_api      requests in OpenAI's form to sampling parameters, outputs to its answers
    protection      who may ask and how much: hosts, keys, bodies, slow connections
    server          the routes, and the program
"""
