"""The HTTP server: an OpenAI-compatible interface to the engine, documents that requests share, and a page."""
