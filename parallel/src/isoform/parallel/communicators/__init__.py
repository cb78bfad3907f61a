"""One module per transport: each brings non-blocking sends and receives of bytes, nothing else.

None is imported before it is asked for, so that none needs the others' libraries.
"""
