"""The OpenAPI description of the server: bodies from protocol.py, answers only as far as clients may rely on them."""

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
        "What follows a prompt.",
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
    "/v1/models": ("The model that is served.", "application/json"),
    "/v1/models/{name}": ("One model.", "application/json"),
    "/state": ("How things stand, and the last steps.", "application/json"),
    "/health": ("Whether the process works; if not, replace it.", "application/json"),
    "/ready": ("Whether requests are admitted now.", "application/json"),
    "/metrics": ("Metrics, as Prometheus reads them.", "text/plain"),
    "/openapi.json": ("This description.", "application/json"),
    "/": ("A page to try the model and watch the engine.", "text/html"),
}
REFUSALS = {
    "400": "The request cannot be served; the message names the field, its value and what is allowed.",
    "401": "A valid API key is needed.",
    "404": "There is no such model or path.",
    "408": "The body did not come in time.",
    "413": "The body is too long.",
    "415": "The body is not application/json.",
    "429": "Too much is waiting; Retry-After says when to come back.",
    "500": "The request failed.",
    "503": "Nothing is admitted now; Retry-After says when to come back.",
}


@cache
def describe(model: str) -> dict[str, Any]:
    """The document, as OpenAPI 3.1, for a server of this model."""
    bodies = [(body, "validation") for _, bodies, _ in POSTS.values() for body in bodies]
    _, found = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = {**found["$defs"], "Error": _error()}
    for schema in schemas.values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": [model, None]}
    paths: dict[str, Any] = {path: {"post": _post(*facts)} for path, facts in POSTS.items()}
    paths |= {path: {"get": _get(path, *facts)} for path, facts in GETS.items()}
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


def _get(path: str, summary: str, kind: str) -> dict[str, Any]:
    schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
    good = {"description": "The answer.", "content": {kind: {"schema": schema}}}
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": good, **_refusals("401", "429", "503")}}
    if path == "/health":
        operation["responses"]["503"] = good
    if path == "/state":
        number = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
        operation["parameters"] = [{"name": "since", "in": "query", "schema": number}]
        operation["responses"] |= _refusals("400")
    if "{name}" in path:
        named = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": named}]
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
