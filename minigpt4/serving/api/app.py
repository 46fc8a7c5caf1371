"""The server's paths: chat completions, models, health, metrics."""

import time
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from minigpt4.inference import Engine
from minigpt4.serving.api import errors
from minigpt4.serving.api.access import Access
from minigpt4.serving.api.limits import ApiLimits
from minigpt4.serving.api.observing import Metrics, Observed
from minigpt4.serving.api.remote import AllowedHosts, RemoteImages
from minigpt4.serving.api.service import Service


def build_app(
    engine: Engine, limits: ApiLimits | None = None, access: Access | None = None, remote: RemoteImages | None = None
) -> FastAPI:
    """The app over an engine whose thread runs."""
    limits, access = limits or ApiLimits(), access or Access()
    service = Service(engine, limits, remote or RemoteImages(AllowedHosts([]), limits))
    metrics, started = Metrics(engine), int(time.time())
    app = FastAPI(title="MiniGPT-4", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Observed, metrics=metrics)
    errors.install(app)
    checked = [Depends(access.check)]

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "minigpt4"}

    @app.post("/v1/chat/completions", dependencies=checked)
    async def chat(request: Request) -> Response:
        return await service.chat(request)

    @app.get("/v1/models", dependencies=checked)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in engine.checkpoints]}

    @app.get("/v1/models/{name:path}", dependencies=checked)
    async def model(name: str) -> dict[str, Any]:
        if name not in engine.checkpoints:
            raise errors.unknown_model(name, engine.checkpoints)
        return described(name)

    @app.get("/healthz")
    async def health() -> Response:
        state = {"waiting": engine.num_waiting, "running": engine.num_running}
        if engine.is_alive:
            return JSONResponse({"status": "ok", **state})
        return JSONResponse({"status": "the engine stopped", **state}, 503)

    @app.get("/metrics", dependencies=checked)
    async def numbers() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
