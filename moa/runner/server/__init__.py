"""The HTTP server in front of an engine: OpenAI's routes, metrics, a status page. Needs the extra `serve`."""
