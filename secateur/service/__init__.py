"""The gRPC server.

    request ──► interceptor ──► servicer ──► jobs ────► pool ──► worker process ──► engine
                errors to          │         messages   at most N   one job at a time,
                statuses           ▼         to files   at once     may be killed
                                runner ────────▲
                                operations, one after another

What lasts is in two places: `operations` (SQLite) remembers what was asked, what came of it and who
has which blob; `blobs` holds the content, in a folder and, where there is one, an object store.

The server moves messages and files and never looks into a model: what a model can do to a process,
it does to a worker. Nothing in this package but `worker` imports the engine.
"""
