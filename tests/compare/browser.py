"""A headless Chromium, driven over its DevTools protocol: what a page does, asks for and logs."""

import asyncio
import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from hack.vm.debian import need
from nodeproxy.sandbox.pace import scaled

PROGRAM = "chromium-headless-shell"
_OPTIONS = (
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-port=0",
)


def install(say: Callable[[str], None]) -> None:
    """Chromium from Debian, where it is not here yet; one test process at a time. Raises VmError with what is to be done."""
    with (Path(tempfile.gettempdir()) / "nodeproxy-chromium.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if shutil.which(PROGRAM) is None:
            say(f"fetching {PROGRAM} from Debian, about 100 MB; the test of the HTML report needs a browser")
        need({PROGRAM: PROGRAM}, say)


@dataclass
class Page:
    """A page that has been loaded, in a window of so many pixels."""

    send: Callable[..., Any]
    requests: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def screenshot(self, top: int, height: int) -> bytes:
        """This part of the page as PNG."""
        width = await self.evaluate("innerWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        shot = await self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])


class Browser:
    """Opens pages one after the other."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0

    @asynccontextmanager
    async def page(
        self, path: Path, *, width: int, dark: bool = False, script: bool = True, media: str = ""
    ) -> AsyncIterator[Page]:
        """The file, once it is loaded."""
        target = await self._send(None, [], "Target.createTarget", url="about:blank")
        attached = await self._send(None, [], "Target.attachToTarget", targetId=target["targetId"], flatten=True)
        events: list[dict[str, Any]] = []

        async def send(method: str, **parameters: Any) -> Any:
            return await self._send(attached["sessionId"], events, method, **parameters)

        for domain in ("Page", "Network", "Runtime", "Log"):
            await send(f"{domain}.enable")
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        await send("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        await send("Emulation.setScriptExecutionDisabled", value=not script)
        await send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in events):
            await self._receive(attached["sessionId"], events)
        page = Page(send)
        await page.evaluate("new Promise(done => setTimeout(done, 50))" if script else "1")  # what is late is logged, too
        page.requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        logged = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        page.logged = [json.dumps(event["params"]) for event in events if event["method"] in logged]
        yield page
        await self._send(None, [], "Target.closeTarget", targetId=target["targetId"])

    async def _send(self, session: str | None, events: list[dict[str, Any]], method: str, **parameters: Any) -> Any:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json({**message, "sessionId": session} if session else message)
        while True:
            answer = await self._receive(session, events)
            if answer.get("id") == number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    async def _receive(self, session: str | None, events: list[dict[str, Any]]) -> dict[str, Any]:
        message = await asyncio.wait_for(self._socket.receive(), scaled(30))
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise AssertionError(f"the browser went away: {message.type} {message.data}")
        answer: dict[str, Any] = json.loads(message.data)
        if "method" in answer and answer.get("sessionId") == session:
            events.append(answer)
        return answer


@asynccontextmanager
async def open_browser(directory: Path) -> AsyncIterator[Browser]:
    """A browser with an empty profile in this directory; `install` has been called."""
    log = directory / "stderr"
    with log.open("wb") as stderr:
        command = [PROGRAM, *_OPTIONS, f"--user-data-dir={directory / 'profile'}"]
        process = await asyncio.create_subprocess_exec(*command, stderr=stderr, start_new_session=True)
    try:
        async with aiohttp.ClientSession() as session:
            address = await _address(process, log)
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield Browser(socket)
                await socket.send_json({"id": 0, "method": "Browser.close"})
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), scaled(10))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the shell script that it is, and all its processes
        await process.wait()


async def _address(process: asyncio.subprocess.Process, log: Path) -> str:
    async with asyncio.timeout(scaled(60)):
        while process.returncode is None:
            _, found, address = _text(log).partition("DevTools listening on ")
            if found and "\n" in address:
                return address.partition("\n")[0].strip()
            await asyncio.sleep(0.05)
    raise AssertionError(f"{PROGRAM} did not start:\n{_text(log)[-2000:]}")


def _text(file: Path) -> str:
    return file.read_text(errors="replace")
