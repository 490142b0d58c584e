"""Run inside Triton Inference Server, in front of the networks of a DRN model.

    text and clip features -> front -> query tokens and segments -> network(s) -> heads -> front -> moments

`export.triton` writes the model repository. `runtime.backends.triton_client` is the client.
"""
