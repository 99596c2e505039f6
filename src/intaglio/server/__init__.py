"""HTTP server with OpenAI's API for one or more models, on top of the runtime."""
