"""The HTTP routes: DeepSeek's and OpenAI's, the same under "", /v1 and /beta, and the chat page at /.

    POST /chat/completions, /completions     GET /models, /models/NAME     GET /user/balance
    POST /tokenize, /detokenize              GET /tokenizer_info     (vLLM's shapes; lm-eval's remote tokenizer)
    GET  /health (the process lives), /ready (it serves), /metrics (Prometheus), /openapi.json, / (the page)

Bodies are read, parsed and checked here and not by FastAPI, so that limits hold while reading and every error has the API's
shape. What takes long (tokenizing, compiling a grammar) runs beside the event loop.
Does not: decide what a request means (plan), or write replies (replies, stream).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from dsv3.data.chat import CHAT_TEMPLATE, REASONING_TEMPLATE
from dsv3.serve.errors import ApiError, from_validation, json_response
from dsv3.serve.gate import API_PATHS, BASES, Gate
from dsv3.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dsv3.serve.replies import ChatBody, CompletionBody
from dsv3.serve.service import Service
from dsv3.serve.stream import EngineReply

_WEB = Path(__file__).parent / "web"
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
_LARGE = 32 * 1024  # bytes of a body that is parsed beside the event loop
_HEAVY = 256 * 1024  # bytes of a body whose tokens are made beside the event loop, one such body at a time
Model = TypeVar("Model", bound=BaseModel)
Asked = TypeVar("Asked")
Made = TypeVar("Made")


def build_app(service: Service) -> FastAPI:
    """The app of a service, which may still be loading."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="dsv3", docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    _add_routes(app, service)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_middleware(Gate, service=service)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    if _WEB.is_dir():
        app.mount("/", Page(directory=_WEB, html=True))
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    shared: list[tuple[str, str, Callable[[Request], Awaitable[Response]], type[BaseModel] | None]] = [
        ("POST", "/chat/completions", _chat(service), ChatRequest),
        ("POST", "/completions", _completions(service), CompletionRequest),
        ("POST", "/tokenize", _tokenize(service), TokenizeRequest),
        ("POST", "/detokenize", _detokenize(service), DetokenizeRequest),
        ("GET", "/tokenizer_info", _tokenizer_info(service), None),
        ("GET", "/models", _models(service), None),
        ("GET", "/models/{name:path}", _one_model(service), None),
        ("GET", "/user/balance", _balance, None),
    ]
    for base in BASES:
        for method, path, endpoint, body in shared:
            app.add_api_route(
                base + path,
                endpoint,
                methods=[method],
                include_in_schema=base == "/v1",
                operation_id=f"{method.lower()}{path}".translate(str.maketrans("/{}:", "____")),
                response_class=Response,
                openapi_extra=None if body is None else _request_body(body),
            )
    for path, endpoint in (("/health", _health), ("/ready", _ready(service)), ("/metrics", _metrics(service))):
        app.add_api_route(path, endpoint, methods=["GET"], response_class=Response)
    _describe(app, [body for _, _, _, body in shared if body is not None])


# -- routes ------------------------------------------------------------------------------------------------------------


def _chat(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def chat(request: Request) -> Response:
        planner, body = service.planner, await _read(request, ChatRequest)
        plan = await _aside(service, request, planner.chat, body)
        await service.check_grammar(plan.params.grammar, plan.bound)
        return EngineReply(service, plan, request.state.owner, ChatBody)

    return chat


def _completions(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def completions(request: Request) -> Response:
        planner, body = service.planner, await _read(request, CompletionRequest)
        plan = await _aside(service, request, planner.completion, body)
        await service.check_grammar(plan.params.grammar, plan.bound)
        return EngineReply(service, plan, request.state.owner, CompletionBody)

    return completions


def _tokenize(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def tokenize(request: Request) -> Response:
        planner, body = service.planner, await _read(request, TokenizeRequest)

        def answer(asked: TokenizeRequest) -> Response:  # written there too: a million ids take a while
            tokens = planner.tokenize(asked)
            return json_response({"count": len(tokens), "max_model_len": planner.limit, "tokens": tokens})

        return await _aside(service, request, answer, body)

    return tokenize


def _detokenize(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def detokenize(request: Request) -> Response:
        planner, body = service.planner, await _read(request, DetokenizeRequest)
        return json_response({"prompt": await _aside(service, request, planner.detokenize, body.tokens)})

    return detokenize


def _tokenizer_info(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def tokenizer_info(_: Request) -> Response:
        tokenizer, planner = service.tokenizer, service.planner
        names = {
            name: None if token is None else tokenizer.decode([token])
            for name, token in (
                ("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id), ("pad_token", tokenizer.pad_id),
            )
        }  # fmt: skip
        reasons = planner.format is not None and planner.format.reasoning
        template = None if planner.format is None else REASONING_TEMPLATE if reasons else CHAT_TEMPLATE
        return json_response(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **names,
                "chat_template": template,
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": planner.limit,
            }
        )

    return tokenizer_info


def _models(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def models(_: Request) -> Response:
        settings = service.settings
        names = dict.fromkeys((settings.model, *settings.aliases))
        return json_response({"object": "list", "data": [_model(service, name) for name in names]})

    return models


def _one_model(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in (service.settings.model, *service.settings.aliases):
            raise ApiError(
                404,
                f"Model Not Exist: {name!r:.200}: GET /models lists those that do",
                param="model",
                code="model_not_found",
            )
        return json_response(_model(service, name))

    return model


def _model(service: Service, name: str) -> dict[str, Any]:
    limit = service.planner.limit if service.state == "ready" else None
    return {"id": name, "object": "model", "created": service.created, "owned_by": "dsv3", "max_model_len": limit}


async def _balance(_: Request) -> Response:
    """DeepSeek's; nothing is paid for here."""
    return json_response({"is_available": True, "balance_infos": []})


async def _health(_: Request) -> Response:
    return json_response({"status": "ok"})


def _ready(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def ready(_: Request) -> Response:
        if service.state != "ready":
            raise service.not_ready()
        return json_response(
            {"status": "ready", "model": service.settings.model, "system_fingerprint": service.fingerprint}
        )

    return ready


def _metrics(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return metrics


# -- bodies and errors -------------------------------------------------------------------------------------------------


async def _read(request: Request, model: type[Model]) -> Model:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(422, f"the content type is {kind!r:.100}: send application/json", param="content-type")
    body = await request.body()
    return await asyncio.to_thread(_parse, body, model) if len(body) > _LARGE else _parse(body, model)


async def _aside(service: Service, request: Request, work: Callable[[Asked], Made], asked: Asked) -> Made:
    """In a thread. A large body waits for its turn, so that small ones always find a thread."""
    if len(await request.body()) <= _HEAVY:
        return await asyncio.to_thread(work, asked)
    async with service.heavy:
        return await asyncio.to_thread(work, asked)


def _parse(body: bytes, model: type[Model]) -> Model:
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON ({error!s:.200}): send a JSON object") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False)) from None
    except RecursionError:
        raise ApiError(422, "the body is nested too deeply: flatten it") from None


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {
        404: f"there is no {request.url.path!r:.200} here: the API is at /v1/chat/completions, /v1/completions, /v1/models",
        405: f"{request.url.path!r:.200} does not take {request.method}: see /openapi.json",
    }
    status = 405 if error.status_code == 404 and request.url.path in API_PATHS else error.status_code
    headers, api_error = dict(error.headers or {}), ApiError(status, said.get(status, str(error.detail)))
    return json_response(api_error.body, status, {**headers, **api_error.headers})


# -- the OpenAPI document and the page ---------------------------------------------------------------------------------

_REF = "#/components/schemas/{model}"


def _request_body(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe(app: FastAPI, bodies: list[type[BaseModel]]) -> None:
    """Put the schemas of bodies into the OpenAPI document, and the error's beside every route."""
    write = app.openapi

    def openapi() -> dict[str, Any]:
        document = write()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for body in bodies:
            schema = body.model_json_schema(ref_template=_REF)
            schemas.update(schema.pop("$defs", {}))
            schemas[body.__name__] = schema
        text = {"type": ["string", "null"]}
        fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
        inner = {"type": "object", "properties": fields, "required": list(fields)}
        schemas["Error"] = {"type": "object", "properties": {"error": inner}, "required": ["error"]}
        content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"]["default"] = {"description": "Error", "content": content}
        return document

    app.openapi = openapi  # the way FastAPI documents


class Page(StaticFiles):
    """The static files, with headers that let no other script in."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers.update(_PAGE_HEADERS)
        return response
