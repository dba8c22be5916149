"""The gRPC server.

    request ──► interceptor ──► servicer ──► pool ──► worker process ──► engine
                errors to       messages to  at most N   one job at a time,
                statuses        files        at once     may be killed

The server moves messages and files and never looks into a model: what a model can do to a process,
it does to a worker. Nothing in this package but `worker` imports the engine.
"""
