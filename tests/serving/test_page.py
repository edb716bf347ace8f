"""The playground in a real browser: somebody types a token and a user, and asks why."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from tests.browser import Browser
from tests.conftest import unavailable
from tests.pipeline.small_logs import CHAIN_LENGTH
from tests.serving.lm_release import SHORT
from tests.serving.local_service import LocalService
from tests.serving.running import free_ports
from tests.serving.test_release_watcher import changed

ROWS = "[...document.querySelectorAll('#list tr')].map(row => row.cells[1].textContent)"
BESIDE = (
    "[...document.querySelectorAll('#releases > div')].map(list => [...list.querySelectorAll('li')].map("
    "entry => entry.firstChild.textContent.trim()))"
)
WHOLE = "document.querySelectorAll('#why .growing, #readings .growing').length === 0"


@pytest.fixture
def site(ready_lm: str) -> Iterator[tuple[str, LocalService]]:
    """A URL, and what answers there."""
    service = LocalService(ready_lm, language=SHORT)
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(service.middleware, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/", service
    server.should_exit = True
    thread.join()


def browser(folder: Path) -> Browser:
    try:
        return Browser(folder)
    except FileNotFoundError as error:
        unavailable(str(error))
        raise


def test_a_person_looks_at_a_user_and_asks_why(site: tuple[str, LocalService], tmp_path: Path) -> None:
    url, service = site
    wanted = service.post("recommend", {"user_id": "u7", "count": 10}).json()
    user = service.get("users/u7").json()

    async def look() -> None:
        async with browser(tmp_path) as page:
            await page.go(url)
            assert await page.run("document.querySelector('#found').hidden")
            await page.fill("#token", "wrong")
            await page.press("Enter")
            await page.until("document.querySelector('#problem').textContent.includes('valid token')")
            await page.fill("#token", service.secret)
            await page.fill("#user", "u7")
            await page.press("Enter")
            await page.until(f"({ROWS}).length === 10")
            assert await page.run(ROWS) == [item["title"] for item in wanted["items"]]
            assert await page.run("document.querySelectorAll('#users option').length") == len(
                service.get("users").json()["users"]
            )
            assert await page.run("document.querySelectorAll('#events li').length") == CHAIN_LENGTH
            assert user["summaries"]["hierarchical"] in await page.run(
                "document.querySelector('#summaries').textContent"
            )
            # Beside it the order of what reads the items, the list that is written, and that of the night.
            await page.until("document.querySelectorAll('#releases .growing').length === 0")
            told = service.post(
                "rerank", {"user_id": "u7", "items": [item["item_id"] for item in wanted["items"]]}
            ).json()
            written = service.post("next", {"user_id": "u7", "count": 10}).json()
            lists = [
                [item["title"] for item in items] for items in (told["items"], written["items"], user["recommended"])
            ]
            shown = await page.run(BESIDE)
            assert sorted(shown[:2]) == sorted(lists[:2])
            assert shown[2] == lists[2]
            assert lists[0] != await page.run(ROWS)

            # By keyboard alone: the button has the focus and is pressed.
            await page.run("document.querySelector('#list button').focus()")
            await page.press(" ")
            await page.until(f"document.querySelectorAll('#why article').length === 2 && {WHOLE}")
            item = wanted["items"][0]["item_id"]
            for place, name in enumerate(("recexplainer-h", "recexplainer-i")):
                whole = service.post("explain", {"user_id": "u7", "item_id": item, "adapter": name}).json()
                told = await page.run(f"document.querySelectorAll('#why article')[{place}].innerText")
                assert name in told
                assert whole["text"] in told
                assert whole["decision"] in told
            await page.run("document.querySelector('#read').click()")
            await page.until(f"document.querySelectorAll('#readings dd').length === 3 && {WHOLE}")
            assert len(await page.picture(tmp_path / "page.png")) > 20_000
            # Nothing was blocked, thrown or fetched from elsewhere; a wrong token was refused once for each of two requests.
            assert len([said for said in page.said if "401" not in said]) == 0, page.said
            hosts = await page.run("performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")
            assert set(hosts) == {url.rstrip("/")}
            unnamed = (
                "[...document.querySelectorAll('input, button, table')].filter(e => !(e.labels?.length || "
                "e.textContent.trim())).length"
            )
            assert await page.run(unnamed) == 0

            await page.fill("#history", "i3 i4 unheard-of")
            await page.press("Enter")
            await page.until("document.querySelectorAll('#events li').length === 3")
            await page.until("document.querySelector('#summaries').textContent.includes('hierarchical')")

    asyncio.run(look())


def test_a_person_reads_the_description_and_tries_a_route(site: tuple[str, LocalService], tmp_path: Path) -> None:
    url, service = site
    sent = "document.querySelector('#operations-default-release_v1_release_get .live-responses-table')"

    async def look() -> None:
        async with browser(tmp_path) as page:
            await page.go(f"{url}docs")
            await page.until("document.querySelectorAll('.opblock').length > 15")
            await page.run("document.querySelector('.auth-wrapper .authorize').click()")
            await page.until("document.querySelector('.auth-container input') !== null")
            await page.fill(".auth-container input", service.secret)
            await page.run("document.querySelector('.auth-btn-wrapper .authorize').click()")
            await page.until("document.querySelector('.auth-wrapper .authorize.locked') !== null")
            await page.run("document.querySelector('.auth-btn-wrapper .btn-done').click()")
            await page.run("document.querySelector('#operations-default-release_v1_release_get button').click()")
            for button in (".try-out__btn", ".execute"):
                await page.until(f"document.querySelector('{button}') !== null")
                await page.run(f"document.querySelector('{button}').click()")
            await page.until(f"{sent} !== null && {sent}.innerText.includes('200')")
            assert service.get("release").json()["night"] in await page.run(f"{sent}.innerText")
            assert page.said == []
            hosts = await page.run("performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")
            assert set(hosts) == {url.rstrip("/")}
            # What needs no token shows no lock.
            locks = "[...document.querySelectorAll('.opblock')].filter(e => !e.querySelector('.authorization__btn'))"
            assert await page.run(f"{locks}.map(e => e.id)") == ["operations-default-health_v1_health_get"]

    asyncio.run(look())


def test_lists_of_the_release_before_stay_to_be_compared(site: tuple[str, LocalService], tmp_path: Path) -> None:
    url, service = site

    async def look() -> None:
        async with browser(tmp_path) as page:
            await page.go(url)
            await page.fill("#token", service.secret)
            await page.fill("#user", "u1")
            await page.press("Enter")
            await page.until(f"({ROWS}).length === 10")
            before, old = await page.run(ROWS), service.get("release").json()["release"]
            changed(service.config.workspace, tmp_path / "new", -1.0)
            service.backend.watcher.poll()
            await page.fill("#user", "u1")
            await page.press("Enter")
            await page.until(f"document.querySelector('#releases').textContent.includes('Release {old[:12]}')")
            assert await page.run(ROWS) != before
            kept = "[...document.querySelectorAll('#releases div:last-child li')].map(e => e.firstChild.textContent.trim())"
            assert await page.run(kept) == before
            # This release has no adapters, so that nobody is offered to ask.
            assert await page.run("[...document.querySelectorAll('#list button')].every(button => button.disabled)")

    asyncio.run(look())


def test_what_an_item_is_called_is_shown_and_never_run(site: tuple[str, LocalService], tmp_path: Path) -> None:
    url, service = site
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    titles = service.backend.watcher.served.catalogue.titles
    titles[:] = [f"{hostile} {number}" for number in range(len(titles))]  # type: ignore[index]

    async def look() -> None:
        async with browser(tmp_path) as page:
            await page.go(url)
            await page.fill("#token", service.secret)
            await page.fill("#user", "u1")
            await page.press("Enter")
            await page.until(f"({ROWS}).length === 10")
            assert all(title.startswith(hostile) for title in await page.run(ROWS))
            assert await page.run("document.title") == "raypipe"
            assert await page.run("document.querySelectorAll('img, #found script').length") == 0

    asyncio.run(look())
