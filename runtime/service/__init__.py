"""Ground queries over HTTP. Queries that arrive together are batched, and uploaded content is never executed.

`runtime.serve` is the command. Every response with an error status has the JSON body of `http_errors.HttpError`.
"""
