"""The server of the page: one model, several pages, files that stay on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nnunetv2_mstkd.app import dicom
from nnunetv2_mstkd.app.jobs import Job, Worker
from nnunetv2_mstkd.app.session import MEGABYTE, Image, Session
from nnunetv2_mstkd.app.viewer import niivue_module
from nnunetv2_mstkd.errors import InputError, UserError
from nnunetv2_mstkd.images.atomic import atomic_write
from nnunetv2_mstkd.images.geometry import read_nifti_voxels
from nnunetv2_mstkd.inference.predictor import Predictor
from nnunetv2_mstkd.reporting.pictures import label_colors, region_colors

Numbered = TypeVar("Numbered", Image, Job)

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")

MAX_SESSIONS = 16
MAX_FILES = 10_000
MAX_BODY = 4096
"""Bytes of a request that is no upload."""

LOOK_SECONDS = 0.1
"""How often a stream looks for changes, and the server for closed pages."""
KEEP_ALIVE_SECONDS = 10.0
"""How often a stream without changes says something, which shows a page that is gone."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; worker-src blob:; font-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere. NiiVue has its font as data and fetches it."""


@dataclass(frozen=True)
class Settings:
    """How the server runs."""

    host: str = LOOPBACK[0]
    token: str | None = None
    """What every request must know; None: nothing, for a server that only this machine reaches."""
    limit: int = 2048 * MEGABYTE
    """Bytes that a page may upload."""
    grace: float = 10.0
    """Seconds after which a page that has closed is forgotten: one that is reloaded may come back sooner."""
    idle: float = 8 * 3600.0
    """Seconds after which an open page that does nothing is forgotten."""
    example: str = ""
    """Where example images are, for the demo's model."""


@dataclass
class Sessions:
    """The open pages by their secret names."""

    predictor: Predictor
    settings: Settings
    top: Path
    open: dict[str, Session] = field(default_factory=dict)

    def add(self) -> str:
        """Open a session and return its name; InputError if there are too many."""
        if len(self.open) >= MAX_SESSIONS:
            raise InputError(f"{MAX_SESSIONS} pages are open already; close one and reload this page.")
        name = secrets.token_urlsafe(24)
        self.open[name] = Session(self.top / secrets.token_hex(8), self.predictor, self.settings.limit)
        return name

    def close(self, name: str) -> None:
        """Close a session, if there is one of this name."""
        session = self.open.pop(name, None)
        if session is not None:
            session.close()

    def unused(self) -> list[str]:
        """Names of the sessions whose page is closed or idle."""
        now, found = time.monotonic(), []
        for name, session in list(self.open.items()):  # other threads close sessions
            working = any(job.state in ("waiting", "running") for job in session.jobs)
            unused = now - session.last_used
            if (unused > self.settings.grace and not session.streams) or (unused > self.settings.idle and not working):
                found.append(name)
        return found


class Guard:
    """Refuses requests from other pages, of other hosts and without the token, before anything looks at them.

    A page elsewhere can make a browser send requests here; ``Origin`` tells. It can also give its own name this
    machine's address (DNS rebinding); ``Host`` tells.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refusal(scope, headers)
        if refused is not None:
            await refused(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *SAFE_HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that is not let in."""
        host = headers.get("host", "")
        if self.settings.host not in ANY_ADDRESS:
            known = LOOPBACK if self.settings.host in LOOPBACK else (self.settings.host.lower(),)
            if _split(f"//{host}").hostname not in known:
                return _refuse(421, f"This page is not at {host}; open it at the address that mstkd app printed.")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            return _refuse(403, "This request comes from another page.")
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] != "GET":
            return _refuse(403, "This request comes from another page.")
        return self._without_token(scope, headers) if self.settings.token else None

    def _without_token(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request without the token, or to one that has it in its address: a cookie instead."""
        token = str(self.settings.token)
        cookies = (each.strip().partition("=") for each in headers.get("cookie", "").split(";"))
        own_cookie = f"{COOKIE}_{_split('//' + headers.get('host', '')).port}"  # browsers share cookies between ports
        given = [value for name, _, value in cookies if name == own_cookie]
        given += [headers.get("authorization", "").removeprefix("Bearer ")]
        if any(_same(each, token) for each in given):
            return None
        if scope["path"] == "/" and _same(QueryParams(scope["query_string"]).get("token", ""), token):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(own_cookie, token, httponly=True, samesite="strict")
            return answer
        return _refuse(401, "Open the address that mstkd app printed: it ends with the token of this page.")


COOKIE = "mstkd_app"
SAFE_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


def make_app(predictor: Predictor, settings: Settings) -> Starlette:
    """Make the application that serves the page of a model.

    Parameters
    ----------
    predictor
        The model, which must be able to write NIfTI files.

    Raises
    ------
    InputError
        If the model is of images that are no NIfTI files.
    DependencyError
        If the viewer is not installed.
    """
    try:
        predictor.check_output("segmentation.nii.gz")
    except InputError as error:
        raise InputError(f"the page is for NIfTI and DICOM images, not for those of this model ({error})") from None
    routes = _Routes(predictor, settings)
    own = "/api/sessions/{session}"
    return Starlette(
        routes=[
            Route("/", routes.page),
            Route("/niivue.js", routes.niivue),
            Route("/api/model", routes.model),
            Route("/api/sessions", routes.open, methods=["POST"]),
            Route(own, routes.state),
            Route(f"{own}/events", routes.events),
            Route(f"{own}/close", routes.close, methods=["POST"]),
            Route(f"{own}/files", routes.upload, methods=["POST"]),
            Route(f"{own}/sort", routes.calling("sort"), methods=["POST"]),
            Route(f"{own}/discard", routes.calling("discard"), methods=["POST"]),
            Route(f"{own}/clear", routes.calling("clear"), methods=["POST"]),
            Route(f"{own}/images/{{number:int}}", routes.assign, methods=["POST"]),
            Route(f"{own}/images/{{number:int}}.nii", routes.image),
            Route(f"{own}/images/{{number:int}}.nii.gz", routes.image),
            Route(f"{own}/jobs", routes.segment, methods=["POST"]),
            Route(f"{own}/jobs/{{number:int}}/cancel", routes.cancel, methods=["POST"]),
            Route(f"{own}/jobs/{{number:int}}/{{file}}", routes.result),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, settings=settings)],
        exception_handlers={UserError: lambda _, error: _refuse(400, str(error))},
        lifespan=routes.lifespan,
    )


class _Routes:
    """What the addresses of the page do."""

    def __init__(self, predictor: Predictor, settings: Settings) -> None:
        self.predictor, self.settings = predictor, settings
        self._niivue = niivue_module()
        values = sorted({value for each in predictor.labels.values() for value in each})
        self._label_colors = label_colors(values, None)
        self._region_colors = region_colors(predictor.labels, self._label_colors)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Keep the folder of all files, the thread that segments, and the watch for closed pages."""
        with tempfile.TemporaryDirectory(prefix="mstkd_app_", ignore_cleanup_errors=True) as top:
            self.sessions = Sessions(self.predictor, self.settings, Path(top))
            self.worker = Worker(self.predictor)
            watch = asyncio.create_task(self._watch())
            try:
                yield
            finally:
                watch.cancel()
                closing = [run_in_threadpool(self.sessions.close, name) for name in list(self.sessions.open)]
                await asyncio.gather(*closing)
                await run_in_threadpool(self.worker.close)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            # one that reads a large series waits for its lock; the others need not wait for it
            await asyncio.gather(*(run_in_threadpool(self.sessions.close, name) for name in self.sessions.unused()))

    def _session(self, request: Request) -> Session:
        session = self.sessions.open.get(request.path_params["session"])
        if session is None:
            raise HTTPException(404, "This page was closed or idle for long; reload it and drop the images again.")
        session.last_used = time.monotonic()
        return session

    # ---- the page --------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "app.html")

    async def niivue(self, request: Request) -> Response:
        return Response(self._niivue, media_type="text/javascript")

    async def model(self, request: Request) -> Response:
        """What the page says of the model."""
        return JSONResponse(
            {
                "name": self.predictor.folder.resolve().name,
                "modalities": self.predictor.modalities,
                "regions": {name: _hex(color) for name, color in self._region_colors.items()},
                "labels": {str(value): color for value, color in self._label_colors.items()},
                "evaluated": bool(self.predictor.expected_dice),
                "limit": self.settings.limit,
                "example": self.settings.example,
            }
        )

    async def open(self, request: Request) -> Response:
        return JSONResponse({"session": self.sessions.add()})

    async def state(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._session(request).state))

    async def close(self, request: Request) -> Response:
        await run_in_threadpool(self.sessions.close, request.path_params["session"])
        return Response(status_code=204)

    async def events(self, request: Request) -> Response:
        """Send the state of the session whenever it changes, until the page is closed."""
        session = self._session(request)

        async def changes() -> AsyncIterator[str]:
            session.streams += 1
            try:
                seen, said = -1, 0.0
                while not session.closed:
                    if seen != session.version:
                        seen, said = session.version, time.monotonic()
                        yield f"data: {json.dumps(await run_in_threadpool(session.state))}\n\n"
                    elif time.monotonic() - said > KEEP_ALIVE_SECONDS:
                        said = time.monotonic()
                        yield ":\n\n"
                    await asyncio.sleep(LOOK_SECONDS)
                yield "event: closed\ndata:\n\n"
            finally:
                session.streams -= 1
                session.last_used = time.monotonic()

        return StreamingResponse(changes(), media_type="text/event-stream")

    # ---- images ----------------------------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """Take one file, whose name is in the header X-File-Name."""
        session = self._session(request)
        if len(session.uploads) >= MAX_FILES:
            raise InputError(f"More than {MAX_FILES} files at once; drop the series of one patient only.")
        name = _shown_name(request.headers.get("x-file-name", ""))
        path, size, cleared = session.new_file(), 0, session.cleared
        try:
            with path.open("wb") as file:
                async for chunk in request.stream():
                    if session.cleared != cleared:
                        raise InputError(f"{name} was removed with the other images while it arrived.")
                    size += len(chunk)
                    session.count_received(len(chunk))
                    await run_in_threadpool(file.write, chunk)
        except (InputError, OSError, ClientDisconnect) as error:
            path.unlink(missing_ok=True)
            if session.cleared == cleared:
                session.count_received(-size)
            if session.closed:
                raise HTTPException(404, "This page was closed.") from error
            if isinstance(error, OSError):
                raise InputError(f"{name} could not be stored ({error.strerror}).") from error
            raise
        if session.cleared == cleared:
            session.uploads.append((path, name))
        return Response(status_code=204)

    def calling(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        """Return the answer to a request that only calls this method of its session."""

        async def answer(request: Request) -> Response:
            await run_in_threadpool(getattr(self._session(request), name))
            return Response(status_code=204)

        return answer

    async def assign(self, request: Request) -> Response:
        session, content = self._session(request), await _content(request)
        image, name = _of_number(session.images, request), content.get("modality")
        if name is not None and name not in self.predictor.modalities:
            raise InputError(f"The model knows {', '.join(self.predictor.modalities)}, not {name}.")
        channel = None if name is None else self.predictor.modalities.index(name)
        await run_in_threadpool(session.assign, image, channel)
        return Response(status_code=204)

    async def image(self, request: Request) -> Response:
        image = _of_number(self._session(request).images, request)
        return FileResponse(image.path, media_type="application/octet-stream")

    # ---- segmentations ---------------------------------------------------------------------------------------------

    async def segment(self, request: Request) -> Response:
        session, content = self._session(request), await _content(request)
        drop = content.get("drop", [])
        if not isinstance(drop, list) or any(name not in self.predictor.modalities for name in drop):
            raise InputError(f"drop names modalities of the model: {', '.join(self.predictor.modalities)}.")
        job = await run_in_threadpool(session.segment, drop)
        if job is not None:
            self.worker.submit(job)
        return Response(status_code=204)

    async def cancel(self, request: Request) -> Response:
        _of_number(self._session(request).jobs, request).cancel()
        return Response(status_code=204)

    async def result(self, request: Request) -> Response:
        """The segmentation, its uncertainty or its DICOM SEG."""
        session = self._session(request)
        job, file = _of_number(session.jobs, request), request.path_params["file"]
        if job.state != "done":
            raise HTTPException(404, "There is no such segmentation.")
        path = {"segmentation.nii.gz": job.segmentation, "uncertainty.nii.gz": job.uncertainty}.get(file)
        if file == "segmentation.dcm" and job.series is not None:
            path = job.folder / file
            await run_in_threadpool(self._write_segmentation_object, session, job, path)
        if path is None:
            raise HTTPException(404, "There is no such file.")
        name = f"{file.partition('.')[0]}_{job.subset}.{file.partition('.')[2]}"
        return FileResponse(path, media_type="application/octet-stream", filename=name)

    def _write_segmentation_object(self, session: Session, job: Job, path: Path) -> None:
        """Write the DICOM SEG of a segmentation, once; another download waits for it."""
        with session.lock:
            if path.is_file() or job.series is None:
                return
            with atomic_write(path) as scratch:
                dicom.write_segmentation_object(
                    read_nifti_voxels(job.segmentation), self.predictor.labels, self._region_colors, job.series,
                    self.predictor.folder.resolve().name, scratch,
                )  # fmt: skip


def _of_number(things: Sequence[Numbered], request: Request) -> Numbered:
    """The image or job whose number is in the address."""
    found = next((thing for thing in things if thing.number == request.path_params["number"]), None)
    if found is None:
        raise HTTPException(404, "That image or segmentation is not there any more.")
    return found


async def _content(request: Request) -> Mapping[str, Any]:
    """The JSON object of a request."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, "The request is too long.")
    try:
        content = json.loads(body or b"{}")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise HTTPException(400, "The request holds no JSON object.")
    return content


def _refuse(status: int, text: str) -> Response:
    return PlainTextResponse(text, status)


def _split(address: str) -> SplitResult:
    """The parts of an address, all empty if it is malformed."""
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises as well
    except ValueError:
        return SplitResult("", "", "", "", "")
    return parts


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _shown_name(text: str) -> str:
    """The name of a file as the user knows it, short and without what is no text."""
    name = unquote(text).replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in name if letter.isprintable())[:120] or "a file without a name"


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
