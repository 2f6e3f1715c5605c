"""Ways in from outside: an HTTP server that OpenAI's clients can talk to, and pages of a run.

`python -m serving.server` starts it (`make serve`). It needs the packages of
requirements-serve.txt. The pages are plain HTML, CSS and JavaScript without a build step: what they
share is view.js and view.css. No lesson needs this wing. A file imports only files above it.

    replay          a recording as a page of its own: one file that needs no network
    engine_thread   the engine in a thread of its own; what it writes, handed to an event loop
    openai_api      requests in OpenAI's form to sampling parameters, outputs to its answers
    answers         whole answers, streams of events, and clients that leave
    live            the events of the live page: each step, sent to the open pages
    protection      who may ask and how much: hosts, keys, bodies, slow connections
    server          the routes, and the program
    hf_paged_cache  the pool as a cache for transformers' own generate()
    routing         which replica gets a request: four routers, each a function
    replicas        copies of the server on a Ray cluster: a front, a router, what replicas report
"""
