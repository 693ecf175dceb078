"""The tracer: the operations that a function runs, recorded."""
