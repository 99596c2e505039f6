"""The server: a model behind OpenAI's HTTP API. It adds to the runtime only what HTTP needs."""
