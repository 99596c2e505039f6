"""OpenAPI description of the server: request bodies from protocol.py, and the response fields that are stable."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from intaglio import __version__
from intaglio.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeChat,
    TokenizeText,
)

POSTS: dict[str, tuple[str, tuple[type[BaseModel], ...], dict[str, str]]] = {
    "/v1/chat/completions": (
        "The next message of a conversation.",
        (ChatRequest,),
        {"id": "string", "object": "string", "created": "integer", "model": "string", "choices": "array"},
    ),
    "/v1/completions": (
        "Continue a prompt.",
        (CompletionRequest,),
        {"id": "string", "object": "string", "created": "integer", "model": "string", "choices": "array"},
    ),
    "/v1/embeddings": ("Refused: the models served generate text.", (EmbeddingRequest,), {}),
    "/tokenize": (
        "The token ids of a text or a conversation.",
        (TokenizeText, TokenizeChat),
        {"count": "integer", "max_model_len": "integer", "tokens": "array"},
    ),
    "/detokenize": ("The text of token ids.", (DetokenizeRequest,), {"prompt": "string"}),
}
GETS = {
    "/v1/models": ("The models that are served.", "application/json"),
    "/v1/models/{name}": ("One model.", "application/json"),
    "/state": ("Queue, K/V cache and the last steps of a model, by default the first.", "application/json"),
    "/health": ("Liveness: 503 if the process should be restarted.", "application/json"),
    "/ping": ("Liveness, as /health.", "application/json"),
    "/version": ("The server's version.", "application/json"),
    "/ready": ("Readiness: 503 if requests are refused now.", "application/json"),
    "/metrics": ("Metrics in Prometheus' text format.", "text/plain"),
    "/openapi.json": ("This description.", "application/json"),
    "/": ("A page to try the model and watch the engine.", "text/html"),
}
REFUSALS = {
    "400": "The request cannot be served; the message names the field, its value and what is allowed.",
    "401": "A valid API key is needed.",
    "404": "There is no such model or path.",
    "408": "The body was not received in time.",
    "413": "The body is too long.",
    "415": "The body is not application/json.",
    "429": "Too many requests; Retry-After says when to retry.",
    "500": "The request failed.",
    "503": "Requests are refused now; Retry-After says when to retry.",
}


@cache
def describe(models: tuple[str, ...]) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document of a server, as a dict.

    models: names of the models that the server serves.
    """
    bodies = [(body, "validation") for _, bodies, _ in POSTS.values() for body in bodies]
    _, found = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = {**found["$defs"], "Error": _error()}
    for schema in schemas.values():
        if schema.get("additionalProperties") is False:
            schema["additionalProperties"] = {"type": "null"}  # null is the same as leaving a field out
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": [*models, None] if len(models) == 1 else [*models]}
            schema["required"] = [*schema.get("required", ()), *(["model"] if len(models) > 1 else [])]
    paths: dict[str, Any] = {path: {"post": _post(*facts)} for path, facts in POSTS.items()}
    paths |= {path: {"get": _get(path, models, *facts)} for path, facts in GETS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Intaglio", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


EVENT = {
    "type": "object", "description": "One event of the stream: a chunk as JSON, or [DONE].", "required": ["data"],
    "properties": {"data": {"type": "string"}},
}  # fmt: skip


def _post(summary: str, bodies: tuple[type[BaseModel], ...], fields: dict[str, str]) -> dict[str, Any]:
    refs = [{"$ref": f"#/components/schemas/{body.__name__}"} for body in bodies]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    content: dict[str, Any] = {"application/json": {"schema": _object(fields)}}
    if "choices" in fields:
        content["text/event-stream"] = {"schema": EVENT}
    good = {"200": {"description": "The answer.", "content": content}} if fields else {}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "requestBody": body, "responses": {**good, **_refusals(*REFUSALS)}}


def _get(path: str, models: tuple[str, ...], summary: str, kind: str) -> dict[str, Any]:
    schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
    good = {"description": "The answer.", "content": {kind: {"schema": schema}}}
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": good, **_refusals("401", "429", "503")}}
    if path in ("/health", "/ping"):
        operation["responses"]["503"] = good
    if path == "/state":
        number = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
        named: dict[str, Any] = {"type": "string", "enum": [*models]}
        operation["parameters"] = [
            {"name": "since", "in": "query", "schema": number}, {"name": "model", "in": "query", "schema": named}
        ]  # fmt: skip
        operation["responses"] |= _refusals("400", "404")
    if "{name}" in path:
        text = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": text}]
        operation["responses"] |= _refusals("404")
    return operation


def _refusals(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": REFUSALS[status], "content": content} for status in statuses}


def _object(fields: dict[str, str]) -> dict[str, Any]:
    properties = {name: {"type": kind} for name, kind in fields.items()}
    return {"type": "object", "properties": properties, "required": list(fields)}


def _error() -> dict[str, Any]:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": maybe, "code": maybe}
    error = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
